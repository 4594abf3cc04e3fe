"""Checkpoints of one process: written in the background, never half-written, and only what was written is read.

test_manager_on_ranks.py has those of several."""

import errno
import json
import multiprocessing
import os
import pickletools
import re
import shutil
import signal
import struct
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unite_fast.checkpoint import format as files
from unite_fast.checkpoint.folders import step_folders, step_of, step_path
from unite_fast.checkpoint.manager import Checkpoints
from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.config import Config
from unite_fast.errors import UserError

PROGRESS = {"averages": {"sums": [0.1 + 0.2, 1e-300], "count": 3}, "loader": {"batch": 7, "skipped": [["a", "b"]]}}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "model.a": torch.randn(5, 123),
        "ema.a": torch.randn(5, 123).T,  # strided: safetensors itself refuses it
        "optim.a.step": torch.tensor(3.0),
        "optim.a.momentum": torch.randn(7, dtype=torch.bfloat16),
        "model.empty": torch.zeros(0, 3),
    }


@pytest.fixture
def checkpoints(folder):
    made = Checkpoints(folder, keep_every=0)
    yield made
    made.writer.shutdown()


def save(checkpoints, step, tensors, config=None) -> None:
    checkpoints.save(step, config or Config(), PROGRESS, tensors)
    checkpoints.wait()


def full_disk(*_) -> None:
    raise OSError(28, "No space left on device")


def steps(folder) -> list[int]:
    return [step_of(path) for path in step_folders(folder)]


def test_a_checkpoint_round_trips(checkpoints, folder, tensors, tiny_config):
    save(checkpoints, 12, tensors, tiny_config)
    for path in (folder.parent, folder, folder / "latest", str(step_path(folder, 12))):
        loaded = load_checkpoint(path)
        assert (loaded.step, loaded.progress, loaded.config) == (12, PROGRESS, tiny_config)
        assert loaded.tensors.keys() == tensors.keys()
        for name, value in tensors.items():
            assert loaded.tensors[name].dtype == value.dtype
            assert torch.equal(loaded.tensors[name], value)
    targets = {name: torch.full_like(value, 7) for name, value in tensors.items()}
    checkpoint = checkpoints.find()
    checkpoints.load_into(checkpoint, targets)
    assert (checkpoint.step, checkpoint.progress, checkpoint.config) == (12, PROGRESS, tiny_config)
    assert all(torch.equal(targets[name], value) for name, value in tensors.items())
    assert checkpoints.all_finite(targets)


def test_only_tensors_with_the_prefix_are_read(checkpoints, folder, tensors):
    save(checkpoints, 1, tensors)
    assert load_checkpoint(folder, ("ema.",)).tensors.keys() == {"ema.a"}


def test_a_checkpoint_has_no_pickle(checkpoints, folder, tensors):
    save(checkpoints, 1, tensors)
    assert sorted(os.listdir(folder / "latest")) == ["checkpoint.json", "shard_00001.safetensors"]
    assert json.loads((folder / "latest" / "checkpoint.json").read_text())["content"]["progress"] == PROGRESS
    data = (folder / "latest" / "shard_00001.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    sizes = [info["data_offsets"][1] - info["data_offsets"][0] for name, info in header.items() if name[0] != "_"]
    assert sum(sizes) == sum(value.numel() * value.element_size() for value in tensors.values())
    assert len(data) == 8 + length + sum(sizes)
    with pytest.raises(ValueError):
        list(pickletools.genops(data))


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        (lambda targets: targets.update({"more": torch.zeros(1)}), ("more",)),
        (lambda targets: targets.pop("ema.a"), ("ema.a",)),
        (lambda targets: targets.update({"ema.a": torch.zeros(5, 123)}), ("ema.a", "[123, 5]", "[5, 123]")),
        (
            lambda targets: targets.update({"ema.a": torch.zeros(123, 5).half()}),
            ("ema.a", "torch.float32", "torch.float16"),
        ),
    ],
)
def test_tensors_that_do_not_match_are_named(checkpoints, folder, tensors, change, tokens, mentions):
    save(checkpoints, 1, tensors)
    targets = dict(tensors)
    change(targets)
    with pytest.raises(UserError, match=mentions(step_path(folder, 1), *tokens)) as refusal:
        checkpoints.load_into(checkpoints.find(), targets)
    assert "\n" not in str(refusal.value)


def test_training_continues_while_a_checkpoint_is_written(checkpoints, folder, tensors, monkeypatch):
    """The file has the values at the time of the save."""
    save(checkpoints, 10, tensors)
    may_write, real = threading.Event(), files.save_file
    monkeypatch.setattr(files, "save_file", lambda *call: (may_write.wait(60), real(*call)))
    before = {name: value.clone() for name, value in tensors.items()}
    checkpoints.save(20, Config(), {}, tensors)
    for value in tensors.values():
        value.fill_(-1)
    assert load_checkpoint(folder).step == 10
    assert steps(folder) == [10]
    may_write.set()
    checkpoints.wait()
    loaded = load_checkpoint(folder)
    assert loaded.step == 20
    assert all(torch.equal(loaded.tensors[name], value) for name, value in before.items())
    save(checkpoints, 30, tensors)
    assert all(bool((value == -1).all()) for value in load_checkpoint(folder).tensors.values())


@pytest.mark.parametrize("broken", ["save_file", "flush", "write_manifest", "os.replace"])
def test_a_failed_save_keeps_the_previous_checkpoint(checkpoints, folder, tensors, monkeypatch, broken, mentions):
    save(checkpoints, 10, tensors)
    # Also at the same step: a resumed run may overwrite its own checkpoint.
    for step in (10, 20):
        with monkeypatch.context() as patch:
            patch.setattr(f"unite_fast.checkpoint.format.{broken}", full_disk)
            checkpoints.save(step, Config(), {}, {"model.a": torch.zeros(1)})
            with pytest.raises(UserError, match=mentions(step_path(folder, step), os.strerror(errno.ENOSPC))):
                checkpoints.wait()
        assert sorted(os.listdir(folder)) == ["latest", "step_00000010"]
        loaded = load_checkpoint(folder)
        assert loaded.step == 10
        assert torch.equal(loaded.tensors["model.a"], tensors["model.a"])


@pytest.mark.parametrize("fraction", [0.0, 0.5, None])
def test_a_shard_truncated_or_lost_before_the_commit_fails_the_save(
    checkpoints, folder, tensors, monkeypatch, fraction, mentions
):
    """As on a network file system that accepts a write and loses it. Sizes are checked last."""
    save(checkpoints, 10, tensors)
    write_manifest = files.write_manifest

    def lose(partial: Path, manifest) -> None:
        write_manifest(partial, manifest)
        shard = partial / manifest.shards[0].name
        if fraction is None:
            shard.unlink()
        else:
            os.truncate(shard, int(fraction * manifest.shards[0].size))

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_manifest", lose)
        checkpoints.save(20, Config(), {}, tensors)
        with pytest.raises(UserError, match=mentions(step_path(folder, 20), "shard_00001.safetensors")):
            checkpoints.wait()
    assert sorted(os.listdir(folder)) == ["latest", "step_00000010"]
    assert load_checkpoint(folder).step == 10


def test_a_failed_save_raises_at_the_next_save_and_the_one_after_works(
    checkpoints, folder, tensors, monkeypatch, mentions
):
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full_disk)
        checkpoints.save(10, Config(), {}, tensors)
        with pytest.raises(UserError, match=mentions(step_path(folder, 10), os.strerror(errno.ENOSPC))):
            checkpoints.save(20, Config(), {}, tensors)
    assert steps(folder) == []
    checkpoints.save(30, Config(), {}, tensors)
    checkpoints.close()
    assert load_checkpoint(folder).step == 30


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path, tensors, mentions):
    (tmp_path / "file").touch()
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints", 0)
    checkpoints.save(1, Config(), {}, tensors)
    with pytest.raises(UserError, match=mentions(step_path(checkpoints.folder, 1), os.strerror(errno.ENOTDIR))):
        checkpoints.close()


def test_a_kill_during_a_save_keeps_the_previous_checkpoint(checkpoints, folder, tensors):
    save(checkpoints, 10, tensors)

    def die(_tensors, path, _metadata):
        Path(path).write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)

    def child():
        files.save_file = die
        save(Checkpoints(folder, 0), 20, tensors)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(os.listdir(folder)) == ["latest", "step_00000010", "step_00000020.partial"]
    assert load_checkpoint(folder).step == 10
    save(checkpoints, 30, tensors)
    assert sorted(os.listdir(folder)) == ["latest", "step_00000010", "step_00000030"]


def test_the_newest_intact_checkpoint_is_used(checkpoints, folder, tensors, checkpoint_warnings, mentions):
    checkpoints.keep_every = 1
    for step in (10, 20, 30):
        save(checkpoints, step, tensors)
    flip_a_bit(step_path(folder, 30) / "shard_00001.safetensors")
    (step_path(folder, 20) / "shard_00001.safetensors").unlink()
    assert load_checkpoint(folder.parent).step == 10
    newest, second = checkpoint_warnings()
    assert re.match(mentions(step_path(folder, 30), "shard_00001.safetensors", step_path(folder, 10)), newest)
    assert re.match(mentions(step_path(folder, 20), os.strerror(errno.ENOENT), step_path(folder, 10)), second)
    # A damaged checkpoint given by its path is an error, which suggests an intact one.
    for step in (20, 30):
        with pytest.raises(UserError, match=rf"{step_path(folder, step)} .*step_000000[13]0$"):
            load_checkpoint(step_path(folder, step))
    flip_a_bit(step_path(folder, 10) / "shard_00001.safetensors")
    with pytest.raises(UserError, match=mentions(folder, step_path(folder, 30))):
        checkpoints.find()


def test_only_what_the_manifest_lists_is_read(checkpoints, folder, tensors):
    save(checkpoints, 10, tensors)
    path = folder / "latest"
    shutil.copy(path / "shard_00001.safetensors", path / "shard_00002.safetensors")
    save_file({"model.b": torch.ones(3), "model.a": torch.ones(5, 123)}, path / "shard_00000.safetensors")
    (path / "._shard_00001.safetensors").write_bytes(b"a dot file, as some systems make")
    (path / "model.bin").write_bytes(b"\x80\x04N.")
    os.mkfifo(path / "pipe.safetensors")
    (path / "loop.safetensors").symlink_to("loop.safetensors")
    loaded = load_checkpoint(folder).tensors
    targets = {name: torch.full_like(value, 7) for name, value in tensors.items()}
    checkpoints.load_into(checkpoints.find(), targets)
    for state in (loaded, targets):
        assert state.keys() == tensors.keys()
        assert all(torch.equal(state[name], value) for name, value in tensors.items())


def with_shards(path: Path, change) -> None:
    """Change the list of shards in a manifest, and its checksum."""
    outer = json.loads((path / files.MANIFEST).read_text())
    change(outer["content"]["shards"])
    (path / files.MANIFEST).write_text(json.dumps(outer | {"crc32": files._crc32(outer["content"])}))


@pytest.mark.parametrize(
    "change",
    [
        lambda shards: shards.clear(),
        lambda shards: shards.append(shards[0]),
        *(
            lambda shards, key=key, value=value: shards[0].update({key: value})
            for key, values in {
                "name": ["/dev/zero", "../x", "a/b", "", ".", "..", ".hidden", "a\n", "shard\0", "\u0663", 3, None],
                "size": [-1, "1_0", 1.0, 2**70, True, None],
                "crc32": [-1, 2**32, "7", [1], None],
            }.items()
            for value in values
        ),
        lambda shards: shards[0].pop("crc32"),
    ],
)
def test_a_list_of_shards_that_no_save_writes_is_refused(checkpoints, folder, tensors, change, mentions):
    save(checkpoints, 10, tensors)
    with_shards(folder / "latest", change)
    for read in (lambda: load_checkpoint(folder), checkpoints.find):
        with pytest.raises(UserError, match=mentions(step_path(folder, 10), "checkpoint.json")) as refusal:
            read()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["pipe", "device", "link", "folder"])
def test_a_shard_that_is_no_file_of_the_folder_is_refused(checkpoints, folder, tensors, tmp_path, kind, mentions):
    save(checkpoints, 10, tensors)
    shard = folder / "latest" / "shard_00001.safetensors"
    shard.rename(tmp_path / "outside")
    if kind == "pipe":
        os.mkfifo(shard)
    elif kind == "folder":
        shard.mkdir()
    else:
        shard.symlink_to("/dev/zero" if kind == "device" else tmp_path / "outside")
    if kind != "link":  # what `stat` says
        with_shards(folder / "latest", lambda shards: shards[0].update(size=shard.stat().st_size))
    for read in (lambda: load_checkpoint(folder), checkpoints.find):
        with pytest.raises(UserError, match=mentions("shard_00001.safetensors")):
            read()
    shard.rmdir() if kind == "folder" else shard.unlink()
    (tmp_path / "outside").rename(shard.with_name("other"))
    shard.symlink_to("other")
    if kind == "link":
        assert load_checkpoint(folder).step == 10, "a link within the folder"


def test_values_that_are_not_finite_are_not_resumed_from(checkpoints, folder, tensors, mentions):
    tensors["ema.a"][3, 4] = torch.nan
    save(checkpoints, 10, tensors)
    targets = {name: torch.full_like(value, 7) for name, value in tensors.items()}
    with pytest.raises(UserError, match=mentions(step_path(folder, 10), "finite")):
        checkpoints.load_into(checkpoints.find(), targets)


def test_a_part_that_stands_twice_is_refused(checkpoints, folder, tensors, mentions):
    save(checkpoints, 10, tensors)
    path = folder / "latest"
    shutil.copy(path / "shard_00001.safetensors", path / "shard_00002.safetensors")
    with_shards(path, lambda shards: shards.append(shards[0] | {"name": "shard_00002.safetensors"}))
    targets = {name: torch.full_like(value, 7) for name, value in tensors.items()}
    for read in (lambda: load_checkpoint(folder), lambda: checkpoints.load_into(checkpoints.find(), targets)):
        with pytest.raises(UserError, match=mentions(step_path(folder, 10), "twice")):
            read()


def test_a_folder_that_is_a_link_is_refused_before_the_run(tmp_path, mentions):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "step_00000001.replaced").mkdir(parents=True)
    (tmp_path / "checkpoints").symlink_to(elsewhere)
    with pytest.raises(UserError, match=mentions("checkpoints", "link")):
        Checkpoints(tmp_path / "checkpoints", 0)
    assert [path.name for path in elsewhere.iterdir()] == ["step_00000001.replaced"]


def test_find_returns_none_without_checkpoints(checkpoints):
    assert checkpoints.find() is None


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
