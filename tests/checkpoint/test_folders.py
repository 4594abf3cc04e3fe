"""The folder of checkpoints: paths, the `latest` link, commit, pruning and repair."""

import os
import shutil

import pytest

from unite_fast.checkpoint import folders
from unite_fast.checkpoint.folders import candidates, step_path
from unite_fast.checkpoint.format import read_manifest
from unite_fast.errors import UserError


def steps(folder) -> list[int]:
    return [folders.step_of(path) for path in folders.step_folders(folder)]


def newest_step(path) -> int:
    return read_manifest(candidates(path)[0]).step


def test_latest_is_a_link_that_survives_moving_the_folder(folder, write):
    write(folder, 1)
    write(folder, 2)
    assert os.readlink(folder / "latest") == "step_00000002"
    assert newest_step(folder.parent.rename(folder.parents[1] / "moved")) == 2


def test_all_paths_of_a_run_and_of_a_checkpoint_work(folder, write):
    old, new = write(folder, 1), write(folder, 2)
    assert candidates(folder.parent) == candidates(folder) == [new, old]
    assert candidates(old) == [old]
    assert candidates(folder / "latest") == [folder / "latest"]
    new.rename(folder.parents[1] / "copy")
    assert candidates(folder.parents[1] / "copy") == [folder.parents[1] / "copy"], "whatever its name"
    assert candidates(folder) == [old], "a dangling link is ignored"


@pytest.mark.parametrize("latest", ["folder", "dangling", "absolute", "elsewhere", "loop", "file", "pipe", "own"])
def test_the_newest_is_found_whatever_latest_is(folder, latest, write):
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


def test_only_digits_make_the_name_of_a_checkpoint(folder, write):
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
def test_pruning_keeps_the_newest_two_and_multiples_of_keep_every(folder, keep_every, remaining, write):
    for step in range(10, 70, 10):
        write(folder, step)
        folders.prune(folder, keep_every, step)
    assert steps(folder) == remaining
    assert len(os.listdir(folder)) == len(remaining) + 1
    assert newest_step(folder) == 60


def test_pruning_ignores_checkpoints_of_later_steps(folder, write):
    """`latest` may point to an older checkpoint, set by hand or because a kill came between a save and its link. The
    run then resumes from it, beside folders of later steps."""
    for step in (10, 30, 40):
        write(folder, step)
    folders.point_latest(step_path(folder, 10))
    assert newest_step(folder) == 10
    write(folder, 20)
    folders.prune(folder, 0, 20)
    assert steps(folder) == [10, 20, 30, 40]
    assert candidates(folder) == [step_path(folder, 20), step_path(folder, 10)]


def test_a_partial_save_is_no_checkpoint_and_is_deleted(folder, write):
    write(folder, 10)
    partial = folders.partial_path(step_path(folder, 20))
    folders.make_empty(partial)
    (partial / "shard").write_bytes(b"half")
    assert steps(folder) == [10]
    folders.prune(folder, 0, 10)
    assert sorted(os.listdir(folder)) == ["latest", "step_00000010"]


@pytest.mark.parametrize("calls_before_the_kill", [0, 1, 2, 3])
def test_a_kill_while_a_step_is_rewritten_loses_nothing(folder, monkeypatch, calls_before_the_kill, write):
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
    folders.repair(folder)
    assert (step_path(folder, 10) / "shard").read_bytes() == (b"before" if calls_before_the_kill < 2 else b"again")
    write(folder, 10, b"the next run")
    folders.prune(folder, 0, 10)
    assert sorted(os.listdir(folder)) == ["latest", "step_00000010"]
    assert (folder / "latest" / "shard").read_bytes() == b"the next run"


def test_other_files_in_the_folder_are_ignored(folder, write):
    write(folder, 10)
    (folder / "step_best").write_bytes(b"")
    (folder / "step_00000010 (copy)").mkdir()
    folders.prune(folder, 0, 10)
    assert steps(folder) == [10]
    assert len(os.listdir(folder)) == 4


def test_latest_as_a_real_folder_is_renamed_to_its_step_or_set_aside(folder, checkpoint_warnings, write):
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
    folders.repair(alone)
    assert os.listdir(alone) == ["step_00000010"] and newest_step(alone.parent) == 10
    assert len(checkpoint_warnings()) == 2


def test_a_save_follows_no_link_in_its_folder(folder, tmp_path, write):
    victim = tmp_path / "victim"
    victim.mkdir()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("step_00000010.partial", "latest.partial", "latest"):
        (folder / name).symlink_to(victim)
    folders.make_empty(folder / "step_00000010.partial")
    assert not (folder / "step_00000010.partial").is_symlink() and os.listdir(victim) == []
    (folder / "step_00000010.partial").rmdir()
    write(folder, 10)
    assert os.listdir(victim) == [] and os.readlink(folder / "latest") == "step_00000010"


@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "pipe"])
def test_a_replaced_checkpoint_that_is_no_folder_is_deleted(folder, tmp_path, write, kind):
    """In a folder that came from elsewhere."""
    write(folder, 10)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").touch()
    for name in ("step_00000010.replaced", "step_00000020.replaced", "step_00000030.partial"):
        match kind:
            case "link":
                (folder / name).symlink_to(tmp_path / "victim")
            case "dangling link":
                (folder / name).symlink_to("nowhere")
            case "file":
                (folder / name).touch()
            case "pipe":
                os.mkfifo(folder / name)
    folders.repair(folder)
    folders.prune(folder, 0, 10)
    assert sorted(os.listdir(folder)) == ["latest", "step_00000010"] and newest_step(folder) == 10
    assert os.listdir(tmp_path / "victim") == ["file"]


def test_a_checkpoint_that_was_moved_away_takes_the_place_of_a_link_to_nowhere(folder, write):
    path = write(folder, 10)
    path.rename(folder / "step_00000010.replaced")
    path.symlink_to("nowhere")
    folders.repair(folder)
    assert newest_step(folder) == 10 and not path.is_symlink()


def test_a_file_in_place_of_the_folder_is_refused_before_the_run(tmp_path, mentions):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match=mentions(tmp_path / "checkpoints", "folder")):
        folders.repair(tmp_path / "checkpoints")
