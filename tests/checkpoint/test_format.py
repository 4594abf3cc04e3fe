"""Checkpoint folders: atomic writes, paths, pruning, detection of damage."""

import errno
import json
import os
import shutil

import pytest
import torch

from unite_fast.checkpoint import format as files
from unite_fast.checkpoint.format import (
    MANIFEST,
    DamagedCheckpoint,
    Manifest,
    Shard,
    candidates,
    check_checksums,
    check_sizes,
    places_of,
    read_manifest,
    step_path,
)
from unite_fast.config import Config
from unite_fast.errors import UserError
from unite_fast.recipes import from_tree, to_tree
from unite_fast.training.run_folder import flatten

PROGRESS = {"averages": {"sums": [0.1 + 0.2, 1e-300], "count": 3}, "loader": {"batch": 7, "skipped": [["a", "b"]]}}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


def write(folder, step, content=b"numbers", config=None):
    """Write a checkpoint as a save does, without ranks and tensors."""
    path = step_path(folder, step)
    partial = files.partial_path(path)
    files.make_empty(partial)
    (partial / "shard").write_bytes(content)
    files.write_manifest(partial, Manifest(config or Config(), step, PROGRESS, [files.read_shard(partial / "shard")]))
    files.commit(partial, path)
    return path


def steps(folder) -> list[int]:
    return [files.step_of(path) for path in files.step_folders(folder)]


def newest_step(path) -> int:
    return read_manifest(candidates(path)[0]).step


def test_a_manifest_round_trips(folder, tiny_config):
    manifest = read_manifest(write(folder, 12, b"123456789", tiny_config))
    assert (manifest.config, manifest.step, manifest.progress) == (tiny_config, 12, PROGRESS)
    # The check value in the definition of CRC-32.
    assert manifest.shards == [Shard("shard", 9, 0xCBF43926)]


@pytest.mark.parametrize(("umask", "mode"), [((), "0o644"), ((0o077,), "0o600"), ((0o002,), "0o664")])
def test_the_umask_sets_the_permissions_of_shards(folder, umask, mode):
    before = os.umask(*umask or (0o022,))
    try:
        files.make_empty(folder)
        files.save_safetensors({"a": torch.zeros(3)}, folder / "shard", {})
    finally:
        os.umask(before)
    assert oct((folder / "shard").stat().st_mode & 0o777) == mode


def test_latest_is_a_link_that_survives_moving_the_folder(folder):
    write(folder, 1)
    write(folder, 2)
    assert os.readlink(folder / "latest") == "step_00000002"
    assert newest_step(folder.parent.rename(folder.parents[1] / "moved")) == 2


def test_all_paths_of_a_run_and_of_a_checkpoint_work(folder):
    old, new = write(folder, 1), write(folder, 2)
    assert candidates(folder.parent) == candidates(folder) == [new, old]
    assert candidates(old) == [old]
    assert candidates(folder / "latest") == [folder / "latest"]
    new.rename(folder.parents[1] / "copy")
    assert candidates(folder.parents[1] / "copy") == [folder.parents[1] / "copy"], "whatever its name"
    assert candidates(folder) == [old], "a dangling link is ignored"


@pytest.mark.parametrize("latest", ["folder", "dangling", "absolute", "elsewhere", "loop", "file", "pipe", "own"])
def test_the_newest_is_found_whatever_latest_is(folder, latest):
    """Copies that follow links make a folder of it, and in a received run it may be anything."""
    old, new = write(folder, 1), write(folder, 2)
    link = folder / "latest"
    link.unlink()
    if latest == "folder":
        shutil.copytree(old, link)
    elif latest == "elsewhere":
        link.symlink_to(write(folder.with_name("others"), 1))
    elif latest == "file":
        link.write_text("step_00000001")
    elif latest == "pipe":
        os.mkfifo(link)
    else:
        link.symlink_to({"dangling": "/nowhere/step_00000001", "loop": "latest", "own": old}.get(latest, new))
    assert candidates(folder.parent) == ([old] if latest == "own" else [new, old])


def test_only_digits_make_the_name_of_a_checkpoint(folder):
    new = write(folder, 2)
    for name in ("step_\u0663", "step_", "step_1_0", "step_-1", "step_" + "9" * 200):
        (folder / name).mkdir()
    assert candidates(folder.parent) == [new]


def test_a_missing_checkpoint_is_an_error(tmp_path, mentions):
    with pytest.raises(UserError, match=mentions(tmp_path / "nowhere")):
        candidates(tmp_path / "nowhere")
    with pytest.raises(UserError, match=mentions(tmp_path, "latest")):
        candidates(tmp_path)


@pytest.mark.parametrize(
    ("keep_every", "remaining"), [(0, [50, 60]), (20, [20, 40, 50, 60]), (30, [30, 50, 60]), (7, [50, 60])]
)
def test_pruning_keeps_the_newest_two_and_multiples_of_keep_every(folder, keep_every, remaining):
    for step in range(10, 70, 10):
        write(folder, step)
        files.prune(folder, keep_every, step)
    assert steps(folder) == remaining
    assert len(os.listdir(folder)) == len(remaining) + 1
    assert newest_step(folder) == 60


def test_pruning_ignores_checkpoints_of_later_steps(folder):
    """`latest` may point to an older checkpoint, set by hand or because a kill came between a save and its link. The
    run then resumes from it, beside folders of later steps."""
    for step in (10, 30, 40):
        write(folder, step)
    files.point_latest(step_path(folder, 10))
    assert newest_step(folder) == 10
    write(folder, 20)
    files.prune(folder, 0, 20)
    assert steps(folder) == [10, 20, 30, 40]
    assert candidates(folder) == [step_path(folder, 20), step_path(folder, 10)]


def test_a_partial_save_is_no_checkpoint_and_is_deleted(folder):
    write(folder, 10)
    partial = files.partial_path(step_path(folder, 20))
    files.make_empty(partial)
    (partial / "shard").write_bytes(b"half")
    assert steps(folder) == [10]
    files.prune(folder, 0, 10)
    assert sorted(os.listdir(folder)) == ["latest", "step_00000010"]


@pytest.mark.parametrize("calls_before_the_kill", [0, 1, 2, 3])
def test_a_kill_while_a_step_is_rewritten_loses_nothing(folder, monkeypatch, calls_before_the_kill):
    """A resumed run rewrites a step if it trains no further, or if the checkpoint of that step was damaged."""

    class Kill(BaseException):
        pass

    real, calls = os.replace, []

    def replace(*arguments):
        if len(calls) == calls_before_the_kill:
            raise Kill
        calls.append(arguments)
        real(*arguments)

    write(folder, 10, b"before")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        if calls_before_the_kill < 3:
            with pytest.raises(Kill):
                write(folder, 10, b"again")
        else:
            write(folder, 10, b"again")
    files.repair(folder)
    assert (step_path(folder, 10) / "shard").read_bytes() == (b"before" if calls_before_the_kill < 2 else b"again")
    write(folder, 10, b"the next run")
    files.prune(folder, 0, 10)
    assert sorted(os.listdir(folder)) == ["latest", "step_00000010"]
    assert (folder / "latest" / "shard").read_bytes() == b"the next run"


def test_other_files_in_the_folder_are_ignored(folder):
    write(folder, 10)
    (folder / "step_best").write_bytes(b"")
    (folder / "step_00000010 (copy)").mkdir()
    files.prune(folder, 0, 10)
    assert steps(folder) == [10]
    assert len(os.listdir(folder)) == 4


def test_damage_to_a_shard_is_detected(folder, mentions):
    path = write(folder, 10, bytes(1000))
    shards, shard = read_manifest(path).shards, path / "shard"
    check_sizes(path, shards)
    check_checksums(path, shards)
    flipped = bytearray(1000)
    flipped[617] ^= 1
    shard.write_bytes(flipped)
    check_sizes(path, shards)
    with pytest.raises(DamagedCheckpoint, match=mentions("step_00000010", "shard")):
        check_checksums(path, shards)
    shard.write_bytes(bytes(999))
    with pytest.raises(DamagedCheckpoint, match=mentions("shard", 999, 1000)):
        check_sizes(path, shards)
    shard.unlink()
    for check in (check_sizes, check_checksums):
        with pytest.raises(DamagedCheckpoint, match=mentions("shard", os.strerror(errno.ENOENT))):
            check(path, shards)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_manifest_is_detected(folder, fraction, mentions):
    path = write(folder, 10)
    whole = (path / MANIFEST).read_bytes()
    (path / MANIFEST).write_bytes(whole[: int(fraction * len(whole))])
    with pytest.raises(DamagedCheckpoint, match=mentions("step_00000010", MANIFEST)):
        read_manifest(path)
    (path / MANIFEST).unlink()
    assert candidates(path) == [path], "its name marks it as a checkpoint"
    with pytest.raises(DamagedCheckpoint, match=mentions("step_00000010", MANIFEST)):
        read_manifest(path)


@pytest.mark.parametrize(
    "text",
    ["[]", "3", "null", "{}", '{"format": "unite_fast checkpoint 2"}', "[" * 100_000, '{"format": NaN}', "9" * 5000],
)
def test_a_malformed_manifest_is_detected(folder, text):
    path = write(folder, 10)
    (path / MANIFEST).write_text(text)
    with pytest.raises(DamagedCheckpoint) as refusal:
        read_manifest(path)
    assert "\n" not in str(refusal.value)


def test_an_edited_manifest_is_detected_and_another_version_refused(folder, mentions):
    path = write(folder, 10)
    outer = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(outer).replace('"step": 10', '"step": 11'))
    with pytest.raises(DamagedCheckpoint, match=mentions("step_00000010", MANIFEST)):
        read_manifest(path)
    (path / MANIFEST).write_text(json.dumps(outer | {"format": "unite_fast checkpoint 9"}))
    with pytest.raises(UserError, match=mentions("step_00000010", "checkpoint 9", "checkpoint 2")):
        read_manifest(path)


def named_everywhere() -> Config:
    """Settings in which every place is named."""
    return from_tree(
        Config,
        {
            "data": {"source": "shards", "path": "pipe:touch mark; cat {}"},
            "perceptual": {"vgg_path": "/v", "lpips_path": "/l"},
            "train": {"out": "/o", "wandb": "mine"},
            "evaluation": {"inception": "/i", "reference": "/r"},
        },
    )


def test_a_checkpoint_names_no_file_command_or_address_that_is_used(folder):
    config = named_everywhere()
    read = read_manifest(write(folder, 10, config=config)).config
    assert read == from_tree(Config, {"data": {"source": "shards"}})
    assert files.as_recorded(read) == config
    assert places_of(read).keys() == set(files.PLACES)
    assert places_of(config) == {}, "a recipe's paths are not recorded ones"
    # Settings that may hold any text are either places, or name something that is neither opened nor run.
    texts = {key for key, value in flatten(to_tree(Config())).items() if isinstance(value, str)}
    choices = {"kernels", "attention", "data.loader", "perceptual.input_range", "optim.muon_dtype", "optim.adamw"}
    choices |= {"optim.nonfinite", "train.precision", "train.device", "parallel.strategy", "sampling.solver"}
    choices |= {"sampling.order", "evaluation.features"}
    digests = {"perceptual.vgg_sha256", "perceptual.lpips_sha256"}
    assert texts == {*files.PLACES, *choices, *digests, "name", "data.source", "profile.steps"}


@pytest.mark.parametrize(
    "change", [{"step": step} for step in (-1, 1.5, "1_0", "\u0663", True, 2**80, None)] + [{"progress": []}]
)
def test_values_of_another_kind_are_an_error(folder, change, mentions):
    path = write(folder, 10)
    outer = json.loads((path / MANIFEST).read_text())
    outer["content"] |= change
    (path / MANIFEST).write_text(json.dumps(outer | {"crc32": files._crc32(outer["content"])}))
    with pytest.raises(DamagedCheckpoint, match=mentions(path, MANIFEST)) as refusal:
        read_manifest(path)
    assert "\n" not in str(refusal.value)


def test_a_manifest_that_is_no_file_is_an_error(folder, tmp_path, mentions):
    path = write(folder, 10)
    (path / MANIFEST).rename(tmp_path / "outside")
    os.mkfifo(path / MANIFEST)
    with pytest.raises(DamagedCheckpoint, match=mentions(path, MANIFEST, "regular")):
        read_manifest(path)
    (path / MANIFEST).unlink()
    (path / MANIFEST).symlink_to(tmp_path / "outside")
    with pytest.raises(DamagedCheckpoint, match=mentions(path, MANIFEST, "link")):
        read_manifest(path)


def test_unknown_settings_are_an_error(folder, mentions):
    path = write(folder, 10)
    outer = json.loads((path / MANIFEST).read_text())
    outer["content"]["config"]["zzz"] = 1
    (path / MANIFEST).write_text(json.dumps(outer | {"crc32": files._crc32(outer["content"])}))
    with pytest.raises(UserError, match=mentions("step_00000010", "zzz")):
        read_manifest(path)


def test_latest_as_a_real_folder_is_renamed_to_its_step_or_set_aside(folder, checkpoint_warnings):
    """As `cp -rL` and `scp -r` copy it."""
    path = write(folder, 10)
    (folder / "latest").unlink()
    shutil.copytree(path, folder / "latest")
    assert newest_step(folder.parent) == 10
    write(folder, 20)
    assert os.readlink(folder / "latest") == "step_00000020" and sorted(os.listdir(folder)) == [
        *("latest", "latest.copy", "step_00000010", "step_00000020")
    ]
    # Copied alone, it is the checkpoint.
    alone = folder.parent / "alone" / "checkpoints"
    shutil.copytree(path, alone / "latest")
    assert newest_step(alone.parent) == 10
    files.repair(alone)
    assert os.listdir(alone) == ["step_00000010"] and newest_step(alone.parent) == 10
    assert len(checkpoint_warnings()) == 2


def test_a_save_follows_no_link_in_its_folder(folder, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("step_00000010.partial", "latest.partial", "latest"):
        (folder / name).symlink_to(victim)
    files.make_empty(folder / "step_00000010.partial")
    assert not (folder / "step_00000010.partial").is_symlink() and os.listdir(victim) == []
    (folder / "step_00000010.partial").rmdir()
    write(folder, 10)
    assert os.listdir(victim) == [] and os.readlink(folder / "latest") == "step_00000010"
