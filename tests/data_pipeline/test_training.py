"""Training through each loader: the same pixels give the same run, bit for bit."""

import json
import multiprocessing
import os
import re
import signal

import pytest

from unite_fast.data_pipeline import dali
from unite_fast.data_pipeline.shards.source import ShardSource
from unite_fast.data_pipeline.shards.write import Settings, make_shards

needs_dali = pytest.mark.skipif(dali.missing() is not None, reason="NVIDIA DALI is not installed")


@pytest.fixture
def train(command, tiny_run, tmp_path):
    def run(name, source, path, *settings):
        arguments = (*tiny_run, f"data.source={source}", f"data.path={path}", "data.flip=true", "model.num_classes=3")
        ended = command(
            "train", *arguments, "train.steps=6", "train.log_every=1", f"train.out={tmp_path / name}", *settings
        )
        assert ended.status == 0, ended.err
        return tmp_path / name, ended.out

    return run


@pytest.fixture(scope="module")
def small_shards(image_folder, tmp_path_factory):
    """Shard sets of 8 x 8 images, the size of the tiny model."""
    folder = tmp_path_factory.mktemp("small")
    for format in ("raw", "original", "cropped-jpeg"):
        make_shards(image_folder, folder / format, Settings(format, 8, per_shard=11), workers=1)
    return folder


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in ("total", "l1", "flow", "grad_norm")} for row in rows]


def test_the_same_pixels_give_the_same_run(train, small_shards, image_folder, mentions):
    expected, output = train("folder", "folder", image_folder, "data.workers=0")
    assert re.search(mentions("data", 41, "folder"), output)
    for name, format, workers in (
        ("raw0", "raw", 0),
        ("raw3", "raw", 3),
        ("original0", "original", 0),
        ("original3", "original", 3),
    ):
        folder, output = train(name, "shards", small_shards / format, f"data.workers={workers}", "data.loader=auto")
        assert re.search(mentions("data", 41, "raw" if format == "raw" else "webdataset"), output)
        assert losses(folder) == losses(expected)
    assert len(losses(expected)) == 6


@needs_dali
def test_dali_trains_and_its_runs_resume_only_with_dali(train, command, small_shards, tiny_run, mentions):
    folder, output = train("dali", "shards", small_shards / "original", "data.loader=dali")
    assert re.search(mentions("data", 41, "dali", "data.loader"), output)
    assert len(losses(folder)) == 6
    again = ("shards", small_shards / "original", "train.steps=8", "--resume")
    train("dali", *again, "data.loader=dali")
    with pytest.raises(AssertionError, match=mentions("dali", "pillow", "data.loader=dali")):
        train("dali", *again)


@needs_dali
def test_cropped_jpegs_give_the_same_run_with_every_decoder(train, small_shards):
    pillow, _ = train("pillow", "shards", small_shards / "cropped-jpeg", "data.loader=webdataset")
    other, _ = train("dali", "shards", small_shards / "cropped-jpeg", "data.loader=dali")
    assert losses(pillow) == losses(other)


def test_digits_are_read_from_memory(train, command, tiny_run, tmp_path, mentions):
    ended = command("train", *tiny_run, "train.steps=2", f"train.out={tmp_path / 'digits'}")
    assert ended.status == 0 and re.search(mentions("data", 1437, "memory"), ended.out)


def test_a_killed_worker_is_one_error_line_and_the_run_can_resume(
    command, tiny_run, small_shards, tmp_path, monkeypatch
):
    real = ShardSource.read_into

    def deadly(self, index, image):
        if index == 33 and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, index, image)

    settings = ("data.source=shards", f"data.path={small_shards / 'original'}", "model.num_classes=3")
    arguments = (*tiny_run, *settings, "data.workers=2", "train.checkpoint_every=1", f"train.out={tmp_path / 'run'}")
    monkeypatch.setattr(ShardSource, "read_into", deadly)
    ended = command("train", *arguments)
    ended.error("killed", "data.workers", "--resume", status=75)
    monkeypatch.setattr(ShardSource, "read_into", real)
    assert command("train", *arguments, "--resume").status == 0
