"""What a person sees of a run: whose weights draw the pictures, what the lines say."""

import io
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import unite_fast
from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.data_pipeline import open_source
from unite_fast.model.unite import UNITE
from unite_fast.recipes import load_config
from unite_fast.sampling import sampler
from unite_fast.training import console as report_module
from unite_fast.training.console import PICTURE_COLUMNS, PICTURE_ROWS, Report, held_out_images
from unite_fast.training.train_state import TrainState
from unite_fast.training.trainer import Outcome, train
from unite_fast.utils.images import grid, pairs

ROW = {"step": 6, "images_per_s": 1234.4, "l1": 0.12341, "lpips": 0.56782, "flow": 0.98765, "lr": 1.25e-3}


@pytest.fixture(scope="module")
def config(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    # Averages far from the weights, and guidance: each shows in a picture.
    settings = ("optim.ema_decay=0.9", "train.steps=6", "sampling.guidance=3", "schedule.lr=2e-2", "train.log_every=3")
    return load_config("digits", (*tiny_run, *settings, f"train.out={folder}", "seed=3"))


@pytest.fixture(scope="module")
def run(config) -> Path:
    return train(config).folder


def pixels(picture: Image.Image | Path) -> np.ndarray:
    return np.asarray(Image.open(picture) if isinstance(picture, Path) else picture)


def test_pictures_are_drawn_with_the_averaged_weights(config, run):
    labels = [i % 10 for i in range(PICTURE_ROWS * PICTURE_COLUMNS)]
    held_out = open_source("digits", "", 8, "test").read(range(40))[0]
    averaged = unite_fast.load(run)

    raw = UNITE(config.model)
    tensors = load_checkpoint(run).tensors
    raw.load_state_dict({n.removeprefix("model."): x for n, x in tensors.items() if n.startswith("model.")})

    def drawn(network) -> tuple[np.ndarray, np.ndarray]:
        samples = sampler.sample_images(network, torch.tensor(labels), config.sampling, config.seed)
        copies = sampler.reconstruct(network, held_out, config.seed)
        return pixels(grid(samples, PICTURE_COLUMNS)), pixels(pairs(held_out, copies, PICTURE_COLUMNS))

    for kind, want, other in zip(("samples", "reconstructions"), drawn(averaged.network), drawn(raw), strict=True):
        for path in (run / f"{kind}.png", run / kind / "step_00000006.png"):
            assert np.array_equal(pixels(path), want), path
        assert not np.array_equal(want, other)


def test_images_that_no_training_saw_are_reconstructed(config, tmp_path):
    test, _ = open_source("digits", "", 8, "test").read(range(40))
    assert torch.equal(held_out_images(config), test)
    # Without a test split, some of the training images.
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(2):
            Image.fromarray(np.full((8, 8, 3), 60 * i + ord(label), np.uint8)).save(tmp_path / label / f"{i}.png")
    config = load_config("digits", ("data.source=folder", f"data.path={tmp_path}", "model.num_classes=2"))
    assert [int(image.float().mean()) for image in held_out_images(config)] == [97, 157, 98, 158]


@pytest.fixture
def make(config, monkeypatch):
    """A report that writes into memory, and what it has said so far."""

    def run(terminal: bool = False, main: bool = True, **changes) -> tuple[Report, io.StringIO]:
        written = io.StringIO()
        monkeypatch.setattr(
            report_module,
            "Console",
            lambda **options: Console(file=written, force_terminal=terminal, width=200, **options),
        )
        state = TrainState(UNITE.create(config.model, 0), config)
        for name, value in changes.items():
            setattr(state, name, value)
        return Report(Path("somewhere"), config, torch.device("cpu"), state, False, main), written

    return run


def test_the_first_line_says_what_trains(make, config):
    _, written = make()
    line = written.getvalue()
    parameters = sum(p.numel() for p in UNITE(config.model).parameters()) / 1e6
    for part in (f"{parameters:.2f} M", "float32 on cpu", "eager", "batch 8,", "steps 0..6", "in somewhere"):
        assert part in line


def test_a_line_of_progress_holds_the_rows_numbers_and_the_time_left(make, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    report, written = make(step=2)
    with report.progress_bar():
        report.state.step = 4
        now[0] += 20.0
        written.truncate(0)
        report.show({**ROW, "step": 4, "mfu": 0.4321})
    # 10 s a step since this process began, and 2 of 6 steps to go.
    assert re.search(
        r"^step 4/6 .* 1234 img/s mfu 43.2% .*l1 0.1234 flow 0.988 .*lr 1.25e-03 .*20 s left$",
        written.getvalue().strip("\0\n"),
    )
    assert "lpips" not in written.getvalue()


def test_lpips_is_in_the_line_where_it_trains(make, config, monkeypatch):
    monkeypatch.setattr(config.perceptual, "weight", 1.0)
    report, written = make()
    with report.progress_bar():
        report.state.step = 6
        report.show(ROW)
    assert "lpips 0.5678" in written.getvalue() and "mfu" not in written.getvalue()


def test_other_processes_say_nothing(make):
    report, written = make(main=False)
    with report.progress_bar():
        report.state.step = 6
        report.show(ROW)
    report.summary(Outcome(Path("x"), 6, 0, 1.0, 2.0), {})
    assert written.getvalue() == ""


def test_the_summary_names_what_was_left_out_and_how_to_go_on(make, mentions):
    report, written = make()
    skipped = {f"image{i:02d}.png": f"reason {i}" for i in range(12)}
    report.summary(Outcome(Path("x"), 5, 15, 9.6, 123.4), skipped)
    text = written.getvalue()
    assert re.search(mentions("5 steps", "10 s", "123 images/s"), text) and re.search(mentions("skipped", 12), text)
    assert "image09.png: reason 9" in text and "image10.png" not in text and re.search(r"\b2 more", text)
    assert re.search(mentions("step 5", 6, "--resume"), text) and "unite-fast sample" not in text
    written.truncate(0)
    report.summary(Outcome(Path("x"), 6, 0, 9.6, 123.4), {"one.png": "torn"})
    assert re.search(mentions("skipped", 1), written.getvalue()) and "unite-fast sample somewhere" in written.getvalue()
