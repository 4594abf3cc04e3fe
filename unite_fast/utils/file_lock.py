"""A folder that one process at a time may write to."""

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from unite_fast.errors import UserError
from unite_fast.utils.files import writing

LOCK = ".lock"
"""The file in the folder. It says who holds it, and may stay: a lock on it lasts only as long as its process."""


def hold(folder: Path, doing: str, instead: str) -> TextIO:
    """Make a folder this process's own, until the file that is returned is closed or the process ends, however it does.

    By a POSIX record lock: a killed process leaves none, and readers that were forked do not inherit it. Where the file
    system knows no locks, nothing is held.

    Args:
        folder: made if it is not there.
        doing: what is done to it, for the message: "being trained".
        instead: how to do without it: "choose another folder with train.out=FOLDER".

    Raises:
        UserError: another process holds it; no permission.
    """
    path = folder / LOCK
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        with file:
            file.seek(0)
            holder = file.read() or "another process"
        raise UserError(
            f"{folder} is {doing} by {holder}; stop that one, or {instead} (if its machine is gone for good, delete "
            f"{path})"
        ) from error
    except OSError:
        pass
    with writing(path):
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
    return file
