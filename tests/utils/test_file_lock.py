"""One process a folder: by the lock of another process, of a dead one, and where there are no locks."""

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
    """A process that holds the folder `tmp_path`/x."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=_hold_lock, args=(tmp_path / "x", there), daemon=True)
    process.start()
    assert here.recv() == "held"
    yield process
    process.kill()
    process.join()


def _hold_lock(folder: Path, pipe) -> None:
    file = lock_folder(folder, "being read", "read another")
    pipe.send("held")
    pipe.recv()
    file.close()


def test_a_folder_that_another_process_holds_is_refused_until_it_is_killed(holder, tmp_path, mentions):
    folder = tmp_path / "x"
    for _ in range(2):  # the first refusal must not have let go what is not its own
        with pytest.raises(UserError) as caught:
            lock_folder(folder, "being read", "read another")
        # What the caller says of both, who it is, and what to delete.
        assert re.match(
            mentions(folder, "being read", f"process {holder.pid}", "read another", folder / LOCK), str(caught.value)
        )
        assert "\n" not in str(caught.value)
    holder.kill()
    holder.join()
    with lock_folder(folder, "being read", "read another"):
        assert re.match(rf"process {os.getpid()}\b", (folder / LOCK).read_text())
    assert os.listdir(folder) == [LOCK]


def test_where_there_are_no_locks_nothing_is_refused(tmp_path, monkeypatch):
    def lockf(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock_folder(tmp_path / "new" / "x", "being read", "read another").close()
    assert os.listdir(tmp_path / "new" / "x") == [LOCK]


def test_a_folder_that_cannot_be_made(tmp_path, mentions):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=mentions(tmp_path / "file", os.strerror(errno.EEXIST))):
        lock_folder(tmp_path / "file", "being read", "read another")
