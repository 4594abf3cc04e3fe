"""Lock a folder: held by another process, left by a killed one, on a file system without locks."""

import errno
import fcntl
import multiprocessing
import os
import re
from pathlib import Path

import pytest

from unite_fast.errors import UserError
from unite_fast.utils.file_lock import LOCK, lock_folder, lock_output


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path`/x."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_hold_lock, args=(tmp_path / "x", theirs), daemon=True)
    process.start()
    assert ours.recv() == "locked"
    yield process
    process.kill()
    process.join()


def _hold_lock(folder: Path, pipe) -> None:
    file = lock_folder(folder, "being read", "read another")
    pipe.send("locked")
    pipe.recv()
    file.close()


def test_a_locked_folder_is_refused_until_the_holder_is_killed(holder, tmp_path, mentions):
    folder = tmp_path / "x"
    for _ in range(2):  # a refusal must not release the lock
        with pytest.raises(UserError) as caught:
            lock_folder(folder, "being read", "read another")
        # The caller's two texts, the holder, and the file to delete.
        assert re.match(
            mentions(folder, "being read", f"process {holder.pid}", "read another", folder / LOCK), str(caught.value)
        )
        assert "\n" not in str(caught.value)
    holder.kill()
    holder.join()
    with lock_folder(folder, "being read", "read another"):
        assert re.match(rf"process {os.getpid()}\b", (folder / LOCK).read_text())
    assert os.listdir(folder) == [LOCK]


def test_a_file_system_without_locks_refuses_nothing(tmp_path, monkeypatch):
    def lockf(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock_folder(tmp_path / "new" / "x", "being read", "read another").close()
    assert os.listdir(tmp_path / "new" / "x") == [LOCK]


def test_a_folder_that_cannot_be_created_is_named(tmp_path, mentions):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=mentions(tmp_path / "file", os.strerror(errno.EEXIST))):
        lock_folder(tmp_path / "file", "being read", "read another")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_lock_file_that_is_no_file_is_named_with_what_to_do(tmp_path, make, mentions):
    make(tmp_path / LOCK)
    with pytest.raises(UserError, match=mentions(tmp_path / LOCK, "not a regular file", "delete")):
        lock_folder(tmp_path, "being read", "read another")


@pytest.mark.parametrize("second_name", ["link", "hard link"])
def test_a_lock_file_is_never_another_file(tmp_path, second_name, mentions):
    """In a folder that came from elsewhere."""
    victim, folder = tmp_path / "victim", tmp_path / "x"
    victim.write_text("mine")
    folder.mkdir()
    (folder / LOCK).symlink_to(victim) if second_name == "link" else os.link(victim, folder / LOCK)
    with pytest.raises(UserError, match=mentions(folder / LOCK, "link")):
        lock_folder(folder, "being read", "read another")
    assert victim.read_text() == "mine"


def _hold_output(out: Path, pipe) -> None:
    with lock_output(out):
        pipe.send("locked")
        pipe.recv()


def test_an_output_has_one_writer_and_its_lock_file_goes(tmp_path, mentions):
    fork, out = multiprocessing.get_context("fork"), tmp_path / "new" / "a.npz"
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_hold_output, args=(out, theirs), daemon=True)
    process.start()
    assert ours.recv() == "locked"
    with pytest.raises(UserError, match=mentions(out, f"process {process.pid}")), lock_output(out):
        pass
    process.kill()
    process.join()
    with lock_output(out):
        assert len(os.listdir(out.parent)) == 1
    assert os.listdir(out.parent) == []


def test_the_name_of_a_holder_is_printed_without_its_control_characters(holder, tmp_path):
    (tmp_path / "x" / LOCK).write_bytes(b"\x1b[31m\n\xff")
    with pytest.raises(UserError) as caught:
        lock_folder(tmp_path / "x", "being read", "read another")
    assert str(caught.value).isprintable()


def test_a_lock_file_that_its_holder_just_deleted_is_made_again(tmp_path, monkeypatch):
    path, original = tmp_path / ".a.lock", fcntl.lockf
    deletions = iter([True, False])

    def lockf(file, operation):
        if next(deletions):  # between opening and locking
            path.unlink()
        original(file, operation)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with lock_output(tmp_path / "a"):
        assert path.exists()


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    with lock_output(tmp_path / ("a" * 255)), lock_output(tmp_path / ("b" * 255)):
        assert len(list(tmp_path.iterdir())) == 2
