"""Console output of a run and its pictures: which weights draw them, and what each line shows."""

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
from unite_fast.config import Config
from unite_fast.data_pipeline import open_source
from unite_fast.model.unite import UNITE
from unite_fast.recipes import load_config
from unite_fast.sampling import sampler
from unite_fast.training import console as report_module
from unite_fast.training import pictures as pictures_module
from unite_fast.training.console import Report
from unite_fast.training.pictures import PICTURE_COLUMNS, PICTURE_ROWS
from unite_fast.training.train_state import TrainState
from unite_fast.training.trainer import Outcome, train
from unite_fast.utils.images import grid, pairs

ROW = {"step": 6, "images_per_s": 1234.4, "l1": 0.12341, "lpips": 0.56782, "flow": 0.98765, "lr": 1.25e-3}


@pytest.fixture(scope="module")
def config(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    # Averages far from the weights, and guidance, so that both show in a picture.
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

    def draw_pictures(network) -> tuple[np.ndarray, np.ndarray]:
        samples = sampler.sample_images(network, torch.tensor(labels), config.sampling, config.seed)
        copies = sampler.reconstruct(network, held_out, config.seed)
        return pixels(grid(samples, PICTURE_COLUMNS)), pixels(pairs(held_out, copies, PICTURE_COLUMNS))

    pictures = zip(draw_pictures(averaged.network), draw_pictures(raw), strict=True)
    for kind, (expected, other) in zip(("samples", "reconstructions"), pictures, strict=True):
        for path in (run / f"{kind}.png", run / kind / "step_00000006.png"):
            assert np.array_equal(pixels(path), expected), path
        assert not np.array_equal(expected, other)


@pytest.fixture
def make_report(config, monkeypatch):
    """Makes a report that writes to memory; returns it with its output."""

    def run(
        terminal: bool = False, main: bool = True, config: Config = config, **changes
    ) -> tuple[Report, io.StringIO]:
        printed = io.StringIO()
        monkeypatch.setattr(
            report_module,
            "Console",
            lambda **options: Console(file=printed, force_terminal=terminal, width=200, **options),
        )
        state = TrainState(UNITE.create(config.model, 0), config)
        for name, value in changes.items():
            setattr(state, name, value)
        return Report(Path("somewhere"), config, torch.device("cpu"), state, False, main), printed

    return run


def test_the_run_says_that_its_pictures_show_training_images(make_report, config, monkeypatch):
    assert "training images" not in make_report()[1].getvalue()
    of_training = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "training images: no val"
    monkeypatch.setattr(pictures_module, "real_images", lambda config: of_training)
    assert "reconstructions.png shows training images: no val" in make_report()[1].getvalue()


def test_the_first_line_describes_the_run(make_report, config):
    _, printed = make_report()
    line = printed.getvalue()
    parameters = sum(p.numel() for p in UNITE(config.model).parameters()) / 1e6
    for part in (f"{parameters:.2f} M", "float32 on cpu", "eager", "batch 8,", "steps 0..6", "in somewhere"):
        assert part in line


def test_the_progress_line_shows_metrics_and_the_time_left(make_report, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    report, printed = make_report(step=2)
    with report.progress_bar():
        report.state.step = 4
        now[0] += 20.0
        printed.truncate(0)
        report.show({**ROW, "step": 4, "mfu": 0.4321})
    # 10 s per step since this process started, 2 of 6 steps left.
    assert re.search(
        r"^step 4/6 .* 1234 img/s mfu 43.2% .*l1 0.1234 flow 0.988 .*lr 1.25e-03 .*20 s left$",
        printed.getvalue().strip("\0\n"),
    )
    assert "lpips" not in printed.getvalue()


def test_the_progress_line_shows_lpips_if_it_is_in_the_loss(make_report, config, monkeypatch):
    monkeypatch.setattr(config.perceptual, "weight", 1.0)
    report, printed = make_report()
    with report.progress_bar():
        report.state.step = 6
        report.show(ROW)
    assert "lpips 0.5678" in printed.getvalue() and "mfu" not in printed.getvalue()


def test_only_the_main_process_prints(make_report):
    report, printed = make_report(main=False)
    with report.progress_bar():
        report.state.step = 6
        report.show(ROW)
    report.summary(Outcome(Path("x"), 6, 0, 1.0, 2.0), {})
    assert printed.getvalue() == ""


def test_the_summary_lists_skipped_images_and_the_next_command(make_report, mentions):
    report, printed = make_report()
    skipped = {f"image{i:02d}.png": f"reason {i}" for i in range(12)}
    report.summary(Outcome(Path("x"), 5, 15, 9.6, 123.4), skipped)
    text = printed.getvalue()
    assert re.search(mentions("5 steps", "10 s", "123 images/s"), text) and re.search(mentions("skipped", 12), text)
    assert "image09.png: reason 9" in text and "image10.png" not in text and re.search(r"\b2 more", text)
    assert re.search(mentions("step 5", 6, "--resume"), text) and "unite-fast sample" not in text
    printed.truncate(0)
    report.summary(Outcome(Path("x"), 6, 0, 9.6, 123.4), {"one.png": "torn"})
    assert re.search(mentions("skipped", 1), printed.getvalue()) and "unite-fast sample somewhere" in printed.getvalue()


def test_lines_of_a_run_on_molecules_name_molecules(make_report, tiny_molecules):
    report, printed = make_report(config=load_config("qm9_tiny", tiny_molecules))
    with report.progress_bar():
        report.state.step = 6
        report.show({**ROW, "cross_entropy": 0.43211})
    report.summary(Outcome(Path("x"), 6, 0, 9.6, 123.4), {})
    text = printed.getvalue()
    assert "1234 mol/s" in text and "elements 0.4321" in text and "lpips" not in text
    assert "123 molecules/s" in text and "image" not in text
    assert re.search(r"unite-fast sample somewhere$", text, re.MULTILINE), "no guidance, which molecules do not have"
