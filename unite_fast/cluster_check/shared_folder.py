"""Whether all hosts see one run folder: files, locks, renames."""

import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from torch.distributed.distributed_c10d import Store

from unite_fast.cluster_check.coordinator import get
from unite_fast.errors import UserError, reason_of
from unite_fast.utils.file_lock import lock_folder
from unite_fast.utils.files import writing

SEEN_WITHIN = 8.0
"""Seconds in which a file of another host must appear. NFS may keep what it knows of a folder for longer (nfs(5),
acdirmax), but only of names that were looked up before."""
FILE = "file"
OTHER = "other hosts are waiting"


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it.

    Returns:
        Those that were missing, the innermost first, for `remove_made`.
    """
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def remove_made(folders: Sequence[Path]) -> None:
    """Remove folders that are empty, the innermost first."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def serve(folder: Path, store: Store | None, guests: Sequence[int], seconds: float) -> dict:
    """Rank 0's side of the check; it also deletes what was written.

    Args:
        folder: exists.
        guests: the ranks that call `visit`, one on each of the other hosts.
        seconds: to wait for each answer.

    Returns:
        `seen`: the guests whose files this host sees; `missing`: those whose files it does not see.

    Raises:
        UserError, OSError: the folder cannot be written, or locked.
    """
    place = folder / f".unite_fast-check-{secrets.token_hex(8)}"
    try:
        try:
            with writing(folder):
                place.mkdir()
            _write(place / FILE, place.name)
        except BaseException:
            _say(store, "written", "")
            raise
        _say(store, "written", place.name)
        answers = {guest: _hear(store, f"answer/{guest}", seconds) for guest in guests}
        wrote = [guest for guest, answer in answers.items() if answer == "wrote"]
        seen = [guest for guest in wrote if _appears(place / f"host{guest}", place.name, SEEN_WITHIN) is not None]
        with lock_folder(place, "being checked", OTHER):
            _say(store, "locked", "")
            for guest in wrote:
                _hear(store, f"tried/{guest}", seconds)
        _write(place / "new", "renamed")
        os.replace(place / "new", place / FILE)
        _say(store, "renamed", "")
        for guest in wrote:
            _hear(store, f"done/{guest}", seconds)
        return {"seen": seen, "missing": sorted(set(wrote) - set(seen)), **describe(folder)}
    finally:
        shutil.rmtree(place, ignore_errors=True)


def visit(folder: Path, store: Store, rank: int, seconds: float) -> dict:
    """Another host's side of the check.

    Args:
        folder: the run folder, as this host calls it; it need not exist.

    Returns:
        `sees`: whether rank 0's file is there. If so: `error`: why nothing can be written, or empty;
        `lock_refused`: whether a lock that rank 0 holds is refused here; `renamed_after`: seconds until a file that
        rank 0 replaced was the new one, or None if it never was.
    """
    name = _hear(store, "written", seconds)
    if not name:
        return {"sees": None, **describe(folder)}
    place = folder / name
    if _appears(place / FILE, name, SEEN_WITHIN) is None:
        _say(store, f"answer/{rank}", "absent")
        return {"sees": False, **describe(folder)}
    try:
        _write(place / f"host{rank}", name)
    except OSError as error:
        _say(store, f"answer/{rank}", "failed")
        return {"sees": True, "error": reason_of(error), **describe(folder)}
    _say(store, f"answer/{rank}", "wrote")
    _hear(store, "locked", seconds)
    refused = _is_refused(place)
    _say(store, f"tried/{rank}", "")
    _hear(store, "renamed", seconds)
    after = _appears(place / FILE, "renamed", SEEN_WITHIN)
    _say(store, f"done/{rank}", "")
    return {"sees": True, "error": "", "lock_refused": refused, "renamed_after": after, **describe(folder)}


def describe(folder: Path) -> dict:
    """`file_system` (type, as in /proc/mounts), `mount` (the folder that it is mounted on) and `free` bytes, of the
    folder or the nearest one above it that exists."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists()).resolve()
    kind, mount = "", ""
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
            before, _, after = line.partition(" - ")
            point = before.split()[4].encode("latin-1", "replace").decode("unicode_escape", "replace")
            # A later mount hides an earlier one.
            if Path(point) in (there, *there.parents) and len(point) >= len(mount):
                kind, mount = after.split()[0], point
    return {"file_system": kind, "mount": mount, "free": shutil.disk_usage(there).free}


def _write(path: Path, text: str) -> None:
    with open(path, "x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _appears(path: Path, text: str, seconds: float, pause: Callable[[float], None] = time.sleep) -> float | None:
    """Seconds until a file has this content; None if it has not within `seconds`."""
    begun = time.monotonic()
    while True:
        with suppress(OSError, UnicodeDecodeError):
            if path.read_text() == text:
                return time.monotonic() - begun
        if time.monotonic() - begun > seconds:
            return None
        pause(0.05)


def _is_refused(place: Path) -> bool:
    try:
        lock_folder(place, "being checked", OTHER).close()
    except UserError:
        return True
    return False


def _say(store: Store | None, key: str, text: str) -> None:
    if store is not None:
        store.set(f"folder/{key}", text)


def _hear(store: Store | None, key: str, seconds: float) -> str:
    assert store is not None  # only called for other ranks
    return get(store, f"folder/{key}", seconds, f"no answer about the shared folder ({key})")
