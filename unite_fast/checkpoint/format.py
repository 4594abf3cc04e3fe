"""Checkpoints as folders of files: their names, what makes one whole, which one counts.

    RUN/checkpoints/step_00001000/            a checkpoint
        shard_00001.safetensors               tensors, or parts of tensors, that the first process wrote
        checkpoint.json                       settings, step, progress; name, size and checksum of every shard
    RUN/checkpoints/step_00002000.partial/    one that is being written, or whose writer was killed
    RUN/checkpoints/latest                    link to the newest complete one

Nothing here knows of processes; `checkpoint.py` does.
"""

import json
import logging
import os
import re
import shutil
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from unite_fast.config import Config
from unite_fast.errors import UserError, require
from unite_fast.recipes import from_tree, to_tree
from unite_fast.utils.files import writing

FORMAT = "unite_fast checkpoint 2"
MANIFEST = "checkpoint.json"
LATEST = "latest"
STEP_FOLDER = re.compile(r"step_(\d+)")
PARTIAL = ".partial"
REPLACED = ".replaced"
KEPT = 2
CHUNK = 2**22

log = logging.getLogger("unite_fast.checkpoint")


class DamagedCheckpoint(UserError):
    """One whose files are not those that were written."""


@dataclass
class Shard:
    """A file of a checkpoint."""

    name: str
    size: int
    """bytes"""
    crc32: int


@dataclass
class Manifest:
    """What checkpoint.json says."""

    config: Config
    step: int
    progress: dict
    shards: list[Shard]


def step_folders(folder: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step_*") if STEP_FOLDER.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    return int(STEP_FOLDER.fullmatch(path.name)[1])


def step_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def read_shard(path: Path) -> Shard:
    """Size and checksum of a file as it stands.

    CRC-32, since it is in the standard library, finds every flipped byte, and at 3.7 GB/s on one core is faster than a
    disk; SHA-256 and BLAKE2b run at 1.6 and 0.8 there. It guards against accidents, not against forgers.
    """
    size = crc = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return Shard(path.name, size, crc)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    content = {
        "config": to_tree(manifest.config),
        "step": manifest.step,
        "progress": manifest.progress,
        "shards": [vars(shard) for shard in manifest.shards],
    }
    path = folder / MANIFEST
    path.write_text(json.dumps({"format": FORMAT, "crc32": _crc32(content), "content": content}, indent=1))
    flush(path)


def read_manifest(path: Path) -> Manifest:
    """
    Raises:
        DamagedCheckpoint: it is missing, torn or changed.
        UserError: it is of another version.
    """
    try:
        outer = json.loads((path / MANIFEST).read_text())
        if outer["format"] != FORMAT:
            raise UserError(f"{path} is a {outer['format']!r}; this version reads {FORMAT!r}")
        content = outer["content"]
        if outer["crc32"] != _crc32(content):
            raise DamagedCheckpoint(f"{path} is damaged: {MANIFEST} is not what was written")
        shards = [Shard(**shard) for shard in content["shards"]]
        return Manifest(parse_config(content["config"], path), int(content["step"]), dict(content["progress"]), shards)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path} is damaged: {MANIFEST} is missing") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(f"{path} is damaged: {MANIFEST} cannot be read: {reason_of(error)}") from error


def parse_config(tree: dict, path: Path) -> Config:
    try:
        return from_tree(Config, tree)
    except UserError as error:
        raise UserError(f"the settings in {path} are not of this version: {error}") from error


def _crc32(content: dict) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def check_sizes(path: Path, shards: list[Shard]) -> None:
    """
    Raises:
        DamagedCheckpoint: a shard is missing or of another size.
    """
    for shard in shards:
        try:
            size = (path / shard.name).stat().st_size
        except OSError as error:
            raise DamagedCheckpoint(f"{path} is damaged: {shard.name}: {reason_of(error)}") from error
        if size != shard.size:
            raise DamagedCheckpoint(f"{path} is damaged: {shard.name} has {size} bytes, not {shard.size}")


def check_checksums(path: Path, shards: list[Shard]) -> None:
    """
    Raises:
        DamagedCheckpoint: a shard does not hold what was written.
    """
    for shard in shards:
        try:
            same = read_shard(path / shard.name) == shard
        except OSError as error:
            raise DamagedCheckpoint(f"{path} is damaged: {shard.name}: {reason_of(error)}") from error
        if not same:
            raise DamagedCheckpoint(f"{path} is damaged: {shard.name} does not hold what was written")


def candidates(path: Path) -> list[Path]:
    """The checkpoints that `path` means, best first: itself, or the latest one of a run and those before it.

    Raises:
        UserError: there is none.
    """
    require(path.exists(), f"there is no checkpoint {path}")
    require(path.is_dir(), f"{path} is a file; a checkpoint is a run's folder or a folder in its checkpoints/")
    if (path / MANIFEST).exists() or STEP_FOLDER.fullmatch(path.resolve().name):
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    saved = step_folders(folder)[::-1]
    require(bool(saved), f"{path} holds no checkpoint (no {LATEST})")
    link = folder / LATEST
    # The link and not the highest step counts: someone may have pointed it at an older one. A link that leads nowhere
    # says nothing: someone deleted the newest one, perhaps because it is corrupt.
    if link.exists() and STEP_FOLDER.fullmatch(link.resolve().name):
        saved = [path for path in saved if step_of(path) <= step_of(link.resolve())]
    return saved


def other_than(path: Path) -> Path | None:
    """The newest other checkpoint beside this one that has all its files; for advice."""
    for other in step_folders(path.resolve().parent)[::-1]:
        with suppress(UserError):
            if not other.samefile(path):
                check_sizes(other, read_manifest(other).shards)
                return path.parent / other.name
    return None


def partial_of(path: Path) -> Path:
    """Where the checkpoint `path` is written."""
    return path.with_name(path.name + PARTIAL)


def make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def save_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write contiguous tensors on the CPU into a folder that was just made, and wait until the disk has them.

    Raises:
        OSError: no space left, no permission.
    """
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        # It knows what the system said as text alone.
        number = re.search(r"\(os error (\d+)\)", str(error))
        raise OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error)) from error
    # safetensors makes files that only their owner may read. What others may do, the folder says: to ask for the umask
    # is to set it, and other threads make files meanwhile.
    path.chmod(path.parent.stat().st_mode & 0o666)
    flush(path)


def commit(partial: Path, path: Path) -> None:
    """Give a complete checkpoint its name, and let `latest` name it."""
    flush(partial)
    if path.exists():  # a resumed run writes again what it wrote before, or what was found damaged
        os.replace(path, path.with_name(path.name + REPLACED))
    os.replace(partial, path)
    point_latest(path)
    flush(path.parent)


def point_latest(path: Path) -> None:
    """Let `latest` name this checkpoint, in one step."""
    link = path.with_name(LATEST + PARTIAL)
    with writing(path.with_name(LATEST)):
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, path.with_name(LATEST))


def repair(folder: Path) -> None:
    """Put back what `commit` moved away, if it was killed before the new one had its place."""
    for replaced in folder.glob("step_*" + REPLACED):
        path = replaced.with_suffix("")
        if path.exists():
            shutil.rmtree(replaced)
        else:
            os.replace(replaced, path)


def prune(folder: Path, keep_every: int, step: int) -> None:
    """Of the checkpoints up to `step` delete all but the newest two and those at multiples of `keep_every` steps (0: no
    multiples), and what saves that were killed left behind."""
    for path in [path for path in step_folders(folder) if step_of(path) <= step][:-KEPT]:
        if not keep_every or step_of(path) % keep_every:
            # Renamed first: one that is half deleted must not look like a damaged checkpoint.
            with suppress(OSError):
                os.replace(path, partial_of(path))
    for left in (*folder.glob("step_*" + PARTIAL), *folder.glob("step_*" + REPLACED)):
        shutil.rmtree(left, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until the disk has it, so that a power cut after the rename cannot leave an empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
