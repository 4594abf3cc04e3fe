"""Lock a folder, so that one process at a time writes to it."""

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from unite_fast.errors import UserError
from unite_fast.utils.files import writing

LOCK = ".lock"
"""The lock file; it names the process that holds the lock. It may stay: the lock itself ends with the process."""


def lock_folder(folder: Path, activity: str, alternative: str) -> TextIO:
    """Lock a folder until the returned file is closed or the process ends.

    A POSIX record lock: it ends even if the process is killed, and forked data workers do not inherit it. On a file
    system without locks the folder stays unlocked.

    Args:
        folder: created if missing.
        activity: what the process does with the folder, for the message: "being trained".
        alternative: for the message: "choose another folder with train.out=FOLDER".

    Raises:
        UserError: another process holds the lock, or no permission.
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
            f"{folder} is {activity} by {holder}; stop it, or {alternative} "
            f"(if its machine is gone for good, delete {path})"
        ) from error
    except OSError:
        pass
    with writing(path):
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
    return file
