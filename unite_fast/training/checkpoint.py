"""Checkpoints: one safetensors file each, written aside and renamed.

A file holds the tensors of `TrainState.tensors` and, as JSON in its header, the settings, the step and what else a run
needs to go on. Reading one runs no code of the file's. A run keeps its files in `checkpoints/`, with a link
`latest.safetensors` that moves only after a file is complete.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unite_fast.config import Config, from_tree, require, to_tree
from unite_fast.errors import UserError

FORMAT = "unite_fast checkpoint 1"
LATEST = "latest.safetensors"
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
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # safetensors refuses tensors that share memory or are strided; a checkpoint holds none on purpose.
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial, {FORMAT: header})
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"could not save {path}: {_reason(error)}; checkpoints saved before are untouched") from error


def point_latest(path: Path) -> None:
    """Let `latest.safetensors` name this file, in one step."""
    link = path.with_name(LATEST + ".partial")
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    os.replace(link, path.with_name(LATEST))


def prune(folder: Path, keep_every: int) -> None:
    """Delete all but the newest two checkpoints and those at multiples of `keep_every` steps (0: no multiples)."""
    for path in step_files(folder)[:-KEPT]:
        if not keep_every or step_of(path) % keep_every:
            path.unlink(missing_ok=True)


def step_files(folder: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(folder.glob("step_*.safetensors"), key=step_of)


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


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
        return Checkpoint(from_tree(Config, meta["config"]), meta["step"], meta["progress"], tensors)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a readable checkpoint, or is incomplete: {_reason(error)}") from error


def find_checkpoint(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        require((folder / LATEST).exists(), f"{path} holds no checkpoint (no {LATEST})")
        return folder / LATEST
    require(path.exists(), f"there is no checkpoint {path}")
    return path


def _flush(path: Path) -> None:
    """Wait until the disk has it, so that a power cut after the rename cannot leave an empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
