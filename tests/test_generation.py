"""Many images by one process or several, killed and resumed: the same bits every time."""

import json
import os
import random
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import unite_fast
from unite_fast import generation
from unite_fast.config import SamplingConfig
from unite_fast.generation import Generation, generate_batches, generate_files

SAMPLING = SamplingConfig(solver="multistep", steps=3, guidance=2.0, interval=(0.2, 0.9))


@pytest.fixture(scope="module")
def model(trained_folder):
    return unite_fast.load(trained_folder)


@pytest.fixture
def made() -> Generation:
    return Generation(torch.arange(23) % 10, SAMPLING, seed=5, batch=4)


def test_a_batch_is_what_generate_gives_for_its_places(model, made):
    drawn = list(generate_batches(model.network, made))
    assert [len(part.indices) for part in drawn] == [4, 4, 4, 4, 4, 3]
    indices, images, labels = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    assert torch.equal(indices, torch.arange(23)) and torch.equal(labels, made.labels)
    want = model.generate(made.labels, 5, 4, solver="multistep", steps=3, guidance=2.0, interval=(0.2, 0.9))
    assert torch.equal(images, want)


@pytest.mark.parametrize("solver", ["multistep", "dopri5"])
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_and_what_was_done_before_change_no_bit(model, made, world, solver):
    made = replace(made, sampling=replace(SAMPLING, solver=solver))
    alone = {int(part.indices[0]): part.images for part in generate_batches(model.network, made)}
    shares = [list(generate_batches(model.network, made, rank, world, done={1, 4})) for rank in range(world)]
    assert [len(share) for share in shares] == [-(-4 // world)] * world
    together = {int(part.indices[0]): part.images for share in shares for part in share}
    assert together.keys() == alone.keys() - {4, 16}
    assert all(torch.equal(images, alone[first]) for first, images in together.items())


def test_where_the_last_round_is_short_some_get_an_empty_item(model, made):
    share = list(generate_batches(model.network, made, rank=3, world=4))
    assert [part.indices.tolist() for part in share] == [[12, 13, 14, 15], []]
    assert share[1].images.shape == (0, 3, 8, 8) and share[1].images.dtype == torch.uint8
    assert share[1].labels.tolist() == []


def test_a_longer_generation_begins_with_the_shorter_one(model, made):
    longer = replace(made, labels=torch.arange(40) % 10)
    short, long = (torch.cat([part.images for part in generate_batches(model.network, g)]) for g in (made, longer))
    assert torch.equal(long[:23], short)


def test_an_npz_as_the_field_reads_it(command, trained_folder, model, tmp_path):
    out = tmp_path / "new" / "samples.npz"
    ended = command("generate", trained_folder, "--num", 23, "--batch", 4, "--seed", 5, "--steps", 3, "--out", out)
    assert (ended.status, ended.err, ended.out) == (0, "", f"23 images in {out}\n")
    with np.load(out) as file:
        assert file.files == ["arr_0", "arr_1"]
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (23, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [i % 10 for i in range(23)] and labels.dtype == np.int64
    want = model.generate(labels, seed=5, batch=4, steps=3)
    assert np.array_equal(images, want.permute(0, 2, 3, 1).numpy())
    assert os.listdir(out.parent) == ["samples.npz"]


def test_a_folder_of_pngs(command, trained_folder, model, tmp_path):
    out = tmp_path / "pictures"
    out.mkdir()
    ended = command("generate", trained_folder, "--num", 5, "--classes", "7,2", "--out", out)
    assert ended.status == 0, ended.err
    names = sorted(os.listdir(out))
    assert names == [*(f"{i:06d}_class{label}.png" for i, label in enumerate([7, 2, 7, 2, 7])), "generation.json"]
    want = model.generate([7, 2, 7, 2, 7]).permute(0, 2, 3, 1).numpy()
    for name, image in zip(names, want, strict=False):
        assert np.array_equal(np.asarray(Image.open(out / name)), image)
    assert json.loads((out / "generation.json").read_text())["images"] == 5
    assert os.listdir(tmp_path) == ["pictures"]


def on_a_rank(folder: Path, out: Path, made: Generation) -> None:
    with generation.joined_processes() as (rank, world):
        generate_files(unite_fast.load(folder), made, out, rank, world)


def test_real_processes_write_the_same_file(trained_folder, model, made, ranks, tmp_path):
    generate_files(model, made, tmp_path / "1.npz")
    for world in (2, 4):
        out = tmp_path / f"{world}.npz"
        ranks(world, on_a_rank, trained_folder, out, made)
        assert out.read_bytes() == (tmp_path / "1.npz").read_bytes()
    assert len(os.listdir(tmp_path)) == 3


def test_a_mistake_is_told_by_every_process_and_none_waits(trained_folder, made, ranks, tmp_path):
    (tmp_path / "a.npz").touch()
    with pytest.raises(AssertionError, match=r"(?s)rank 0.*is there already.*rank 1.*is there already"):
        ranks(2, on_a_rank, trained_folder, tmp_path / "a.npz", made, timeout=60)


@pytest.mark.parametrize("name", ["samples.npz", "pictures"])
def test_kill_9_at_any_moment_five_times_in_a_row(trained_folder, process, wait_until, name, tmp_path):
    """Each time the finished batches stay, and in the end there is what a generation that nobody killed leaves."""
    arguments = ("generate", trained_folder, "--num", 90, "--batch", 3, "--solver", "heun", "--steps", 20)
    folder, chance, finished = tmp_path / f"{name}.parts", random.Random(3), set()
    for attempt in range(5):
        running = process(*arguments, "--out", name)
        # Two of them die while they start, the others somewhere in a batch, or while one is written.
        if attempt not in (1, 3):
            wait_until(lambda before=finished: whole(folder) > before)
        time.sleep(chance.uniform(0, 0.05))
        running.signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL, running.printed()
        assert whole(folder) >= finished
        finished = whole(folder)
    assert 3 <= len(finished) < 90, "the kills came in time"

    assert process(*arguments, "--out", name).wait() == 0
    assert process(*arguments, "--out", f"undisturbed_{name}").wait() == 0
    assert contents(tmp_path / name) == contents(tmp_path / f"undisturbed_{name}")
    assert sorted(os.listdir(tmp_path)) == sorted([name, f"undisturbed_{name}", "output.txt"])


def whole(folder: Path) -> set[str]:
    names = os.listdir(folder) if folder.exists() else []
    return {name for name in names if not name.endswith((".partial", ".json"))}


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else {"": path.read_bytes()}


def test_a_resumed_generation_draws_only_what_is_missing(model, made, tmp_path, monkeypatch):
    out, drawn = tmp_path / "a.npz", []
    draw = generation.generate_batch

    def interrupted(*arguments):
        drawn.append(int(arguments[3][0]))
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(generation, "generate_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_files(model, made, out)
    # A file that a power cut emptied does not count as finished.
    os.truncate(tmp_path / "a.npz.parts" / "batch_00000001.uint8", 10)
    generate_files(model, made, out)
    assert drawn == [0, 4, 8, 12, 4, 12, 16, 20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num", 0), "there is nothing to generate"),
        (("--num", -3), "there is nothing to generate"),
        (("--classes", "3,10"), r"class 10 is out of range: this model has classes 0\.\.9"),
        (("--seed", -1), "the seed is -1"),
        (("--batch", 0), "the batch is 0 images"),
        (("--precision", "float8"), "the precision is 'float8'; it must be one of float32, bfloat16"),
        (("--solver", "rk4"), "sampling.solver is 'rk4'"),
        (("--out", "a.png"), r"a\.png ends in \.png; write a \.npz, or a folder"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_anything_is_written(
    command, trained_folder, options, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    error = command("generate", trained_folder, "--num", 5, "--out", "a.npz", *options).error()
    assert re.search(message, error)
    assert os.listdir(tmp_path) == []
