"""Lock a folder: held by another process, left by a killed one, on a file system without locks."""

import errno
import fcntl
import multiprocessing
import os
import re
from pathlib import Path

import pytest

from unite_fast.errors import UserError
from unite_fast.utils.file_lock import LOCK, lock_folder


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
