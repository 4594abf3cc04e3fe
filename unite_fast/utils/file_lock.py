"""Lock a folder or a file, so that one process at a time writes to it."""

import errno
import fcntl
import os
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from unite_fast.errors import UserError, printable
from unite_fast.utils.files import remove_partial, writing

LOCK = ".lock"
"""The lock file; it names the process that holds the lock. It may stay: the lock itself ends with the process."""
MOST_NAME_BYTES = 255


def lock_folder(folder: Path, activity: str, alternative: str) -> TextIO:
    """Lock a folder until the returned file is closed or the process ends.

    A POSIX record lock: it ends even if the process is killed, and forked data workers do not inherit it. On a file
    system without locks the folder stays unlocked.

    Args:
        folder: created if missing.
        activity: what the process does with the folder, for the message: "being trained".
        alternative: for the message: "choose another folder with train.out=FOLDER".

    Raises:
        UserError: another process holds the lock, no permission, or the lock file is a link.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return _lock(folder / LOCK, folder, activity, alternative)


@contextmanager
def lock_output(out: Path) -> Iterator[None]:
    """Lock a file or folder while a command makes it, by a lock file beside it that is deleted at the end. What killed
    commands left of `out` is deleted too.

    Raises:
        UserError: another process is writing it, or no permission.
    """
    path = out.absolute().parent / _lock_name(out.absolute().name)
    with writing(out):
        path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = _lock(path, out, "being written", "choose another output")
        # The process that held the lock may have deleted the file after this one opened it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    remove_partial(out)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        file.close()


def _lock_name(name: str) -> str:
    """Name of the lock file beside a file; a checksum where it would be longer than file systems allow."""
    plain = f".{name}{LOCK}"
    return plain if len(os.fsencode(plain)) <= MOST_NAME_BYTES else f".{zlib.crc32(os.fsencode(name)):08x}{LOCK}"


def _lock(path: Path, target: Path, activity: str, alternative: str) -> TextIO:
    with writing(path):
        # A lock file that is a link, in a folder that came from elsewhere, would write to another file.
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a link; delete it")
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is not a regular file; delete it")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = open(os.open(path, flags, 0o666), "r+", errors="backslashreplace")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        with file:
            holder = printable(file.read(200)) or "another process"
        raise UserError(
            f"{target} is {activity} by {holder}; stop it, or {alternative} "
            f"(if its machine is gone for good, delete {path})"
        ) from error
    except OSError:
        pass
    try:
        with writing(path):
            if os.fstat(file.fileno()).st_nlink > 1:
                raise OSError(errno.EMLINK, "it has a second name (a hard link); delete it")
            file.truncate(0)
        # Only a note for others, so a full disk is no reason to stop.
        with suppress(OSError):
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    except BaseException:
        file.close()
        raise
    return file
