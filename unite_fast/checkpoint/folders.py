"""The folder of a run's checkpoints: names, the `latest` link, commit and cleanup. For one process; manager.py
coordinates ranks.

RUN/checkpoints/step_00001000/            a checkpoint; format.py describes its files
RUN/checkpoints/step_00002000.partial/    a checkpoint being written, or left by a killed process
RUN/checkpoints/latest                    link to the newest complete checkpoint
"""

import itertools
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from unite_fast.checkpoint.format import MANIFEST, check_sizes, log, read_manifest
from unite_fast.errors import UserError, reason_of, require
from unite_fast.utils.files import PARTIAL, flush, make_folder

LATEST = "latest"
STEP_FOLDER = re.compile(r"step_([0-9]{1,18})")
REPLACED = ".replaced"
KEEP_NEWEST = 2


def step_folders(folder: Path) -> list[Path]:
    """Checkpoints in RUN/checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step_*") if STEP_FOLDER.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = STEP_FOLDER.fullmatch(path.name)
    assert match, path
    return int(match[1])


def checkpoint_files(path: Path) -> Path:
    """What is read for `path`, a run folder, a checkpoint or a model file: of a run folder, its checkpoints."""
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def step_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def candidates(path: Path) -> list[Path]:
    """The checkpoints to try for `path`, best first: the checkpoint itself; for a run, the latest one and those before
    it.

    Raises:
        UserError: there is no checkpoint.
    """
    require(path.exists(), f"there is no checkpoint {path}")
    require(path.is_dir(), f"{path} is a file; a checkpoint is a run folder or a folder in its checkpoints/")
    if (path / MANIFEST).exists() or STEP_FOLDER.fullmatch(path.resolve().name):
        return [path]
    folder = checkpoint_files(path)
    saved = step_folders(folder)[::-1]
    if not saved and (folder / LATEST / MANIFEST).is_file():
        return [folder / LATEST]  # copied alone, as a real folder
    require(bool(saved), f"{path} contains no checkpoint (no {LATEST})")
    newest = os.path.realpath(folder / LATEST)
    # The link counts, not the highest step: the user may have pointed it at an older checkpoint. A broken link is
    # ignored: the user deleted the newest checkpoint, perhaps because it is damaged. So is a link to elsewhere, and a
    # folder in place of the link, which copies that follow links make.
    chosen = [path for path in saved if os.path.realpath(path) == newest]
    return [path for path in saved if step_of(path) <= step_of(chosen[0])] if chosen else saved


def find_other(path: Path) -> Path | None:
    """The newest other checkpoint of the same run with all its files, to suggest in a message."""
    for other in step_folders(path.resolve().parent)[::-1]:
        with suppress(UserError):
            if not other.samefile(path):
                check_sizes(other, read_manifest(other).shards)
                return path.parent / other.name
    return None


def partial_path(path: Path) -> Path:
    """Where the checkpoint `path` is written before `commit` renames it."""
    return path.with_name(path.name + PARTIAL)


def make_empty(folder: Path) -> None:
    """Make a new folder for a checkpoint in place of what a killed save left.

    Raises:
        OSError: no space, no permission, or checkpoints/ is a link.
    """
    make_folder(folder.parent)
    _remove(folder)
    folder.mkdir()


def commit(partial: Path, path: Path) -> None:
    """Rename a complete checkpoint to its final name, and point `latest` at it."""
    flush(partial)
    if path.exists():  # a resumed run writes it again, maybe because it was damaged
        os.replace(path, path.with_name(path.name + REPLACED))
    os.replace(partial, path)
    point_latest(path)
    flush(path.parent)


def point_latest(path: Path) -> None:
    """Point `latest` at this checkpoint, atomically. Without it readers take the highest step, so a file system without
    links only gives a warning."""
    latest = path.with_name(LATEST)
    link = path.with_name(f".{LATEST}-{secrets.token_hex(8)}{PARTIAL}")
    try:
        set_aside(latest)
        link.symlink_to(path.name)
        os.replace(link, latest)
    except OSError as error:
        log.warning("%s cannot point at %s: %s; the newest checkpoint counts", latest, path.name, reason_of(error))
        with suppress(OSError):  # it points at an older checkpoint, which readers would take
            latest.unlink(missing_ok=True)
    finally:
        with suppress(OSError):
            link.unlink(missing_ok=True)


def set_aside(latest: Path) -> None:
    """Rename a `latest` that is a real folder, as a copy that follows links makes it (`cp -rL`, `scp -r`): to the step
    that it holds, or to latest.copy if that step is there.

    Raises:
        OSError: no permission.
    """
    if latest.is_symlink() or not latest.is_dir():
        return
    target = latest.with_name(LATEST + ".copy")
    with suppress(UserError):
        target = step_path(latest.parent, read_manifest(latest).step)
    if target.exists():
        names = (latest.with_name(f"{LATEST}.copy{number or ''}") for number in itertools.count())
        target = next(name for name in names if not name.exists())
    os.replace(latest, target)
    log.warning("%s is a folder and no link, as after cp -rL or scp -r: renamed to %s", latest, target.name)


def repair(folder: Path) -> None:
    """Restore a checkpoint that `commit` had moved away when it was killed, and make a copied `latest` a checkpoint.

    Raises:
        UserError: the folder is a link, through which nothing is renamed or deleted, or no folder: no save would
            succeed.
    """
    require(not folder.is_symlink(), f"{folder} is a link, and a run saves through none; put a folder in its place")
    require(folder.is_dir() or not folder.exists(), f"{folder} is no folder, and a run saves in it; move it away")
    with suppress(OSError):  # `point_latest` says so
        set_aside(folder / LATEST)
    for replaced in folder.glob("step_*" + REPLACED):
        path = replaced.with_suffix("")
        if path.exists() or replaced.is_symlink() or not replaced.is_dir():
            _remove(replaced)
        else:
            with suppress(FileNotFoundError):
                path.unlink()  # a link to nowhere
            os.replace(replaced, path)


def prune(folder: Path, keep_every: int, step: int) -> None:
    """Delete checkpoints up to `step`, except the newest two and multiples of `keep_every` (0: no multiples). Also
    delete the remains of killed saves."""
    for path in [path for path in step_folders(folder) if step_of(path) <= step][:-KEEP_NEWEST]:
        if not keep_every or step_of(path) % keep_every:
            # Rename first, so that a half-deleted checkpoint does not look like a damaged one.
            with suppress(OSError):
                os.replace(path, partial_path(path))
    for leftover in (*folder.glob("step_*" + PARTIAL), *folder.glob("step_*" + REPLACED)):
        _remove(leftover)


def _remove(path: Path) -> None:
    """Delete a folder. Of a link only the name goes; a file may be in a folder that came from elsewhere."""
    if path.is_symlink() or not path.is_dir():
        with suppress(OSError):
            path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
