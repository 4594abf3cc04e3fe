"""Checkpoints: one safetensors file each, written aside and renamed.

A file holds the tensors of `TrainState.tensors` and, as JSON in its header, the settings, the step and what else a run
needs to go on. Reading one runs no code of the file's. A run keeps its files in `checkpoints/`, with a link
`latest.safetensors` that moves only after a file is complete.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unite_fast.config import Config, require
from unite_fast.errors import UserError, writing
from unite_fast.recipes import from_tree, to_tree

FORMAT = "unite_fast checkpoint 1"
LATEST = "latest.safetensors"
STEP_FILE = re.compile(r"step_(\d+)\.safetensors")
PARTIAL = ".partial"
KEPT = 2


@dataclass
class Checkpoint:
    config: Config
    step: int
    progress: dict
    """What `Trainer` needs to go on and no tensor holds."""
    tensors: dict[str, Tensor]


def save_checkpoint(path: Path, config: Config, step: int, progress: dict, tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint. Whatever stood at `path` before stays whole until the new file is complete.

    Raises:
        UserError: no space left, or no permission to write.
    """
    header = json.dumps({"config": to_tree(config), "step": step, "progress": progress})
    # A folder, because safetensors itself writes a file of another name first; `prune` finds what a killed run left.
    aside = path.with_name(path.name + PARTIAL)
    partial = aside / path.name
    try:
        aside.mkdir(parents=True, exist_ok=True)
        # safetensors refuses tensors that share memory or are strided; a checkpoint holds none on purpose.
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial, {FORMAT: header})
        partial.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner may read
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"could not save {path}: {_reason(error)}; checkpoints saved before are untouched") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def point_latest(path: Path) -> None:
    """Let `latest.safetensors` name this file, in one step."""
    link = path.with_name(LATEST + PARTIAL)
    with writing(path.with_name(LATEST)):
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, path.with_name(LATEST))


def prune(folder: Path, keep_every: int, step: int) -> None:
    """Of the checkpoints up to `step` delete all but the newest two and those at multiples of `keep_every` steps (0: no
    multiples), and what saves that were killed left behind."""
    for path in [path for path in step_files(folder) if step_of(path) <= step][:-KEPT]:
        if not keep_every or step_of(path) % keep_every:
            path.unlink(missing_ok=True)
    for aside in folder.glob("step_*" + PARTIAL):
        shutil.rmtree(aside, ignore_errors=True)


def step_files(folder: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step_*") if STEP_FILE.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    return int(STEP_FILE.fullmatch(path.name)[1])


def step_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.safetensors"


def load_checkpoint(path: str | Path, prefixes: tuple[str, ...] = ("",)) -> Checkpoint:
    """Read a checkpoint, or of its tensors only those whose names start with one of `prefixes`.

    Args:
        path: a checkpoint, or the folder of a run, which means its latest one.

    Raises:
        UserError: no such file, not a checkpoint, or a torn one.
    """
    path = find_checkpoint(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(FORMAT)
            require(header is not None, f"{path} is a safetensors file but no unite_fast checkpoint")
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}  # noqa: SIM118
        meta = json.loads(header)
        return Checkpoint(_config(meta["config"], path), int(meta["step"]), dict(meta["progress"]), tensors)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        others = [other for other in step_files(path.parent) if not other.samefile(path)] if path.exists() else []
        advice = f"; another one is {others[-1]}" if others else ""
        raise UserError(f"{path} is not a readable checkpoint, or is incomplete: {_reason(error)}{advice}") from error


def _config(tree: dict, path: Path) -> Config:
    try:
        return from_tree(Config, tree)
    except UserError as error:
        raise UserError(f"the settings in {path} are not of this version: {error}") from error


def find_checkpoint(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        if (folder / LATEST).exists():
            return folder / LATEST
        # Someone deleted the newest one, perhaps because it is corrupt.
        files = step_files(folder)
        require(bool(files), f"{path} holds no checkpoint (no {LATEST})")
        return files[-1]
    require(path.exists(), f"there is no checkpoint {path}")
    return path


def _flush(path: Path) -> None:
    """Wait until the disk has it, so that a power cut after the rename cannot leave an empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    """The process's, which can only be read by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
