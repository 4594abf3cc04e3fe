"""The folder of a run: whether it may be begun or gone on with, and the settings that it keeps."""

import os
import signal
from dataclasses import fields
from pathlib import Path
from typing import TextIO

import yaml

from unite_fast.checkpoint.format import step_folders
from unite_fast.checkpoint.manager import Checkpoints
from unite_fast.checkpoint.reader import Checkpoint
from unite_fast.config import Config, EvaluationConfig, ParallelConfig, SamplingConfig
from unite_fast.distributed.launch import launch_name, under_torchrun
from unite_fast.distributed.peers import Peers
from unite_fast.errors import require
from unite_fast.recipes import to_tree
from unite_fast.utils import file_lock
from unite_fast.utils.files import writing, writing_aside

FREE_ON_RESUME = {
    "name",
    "data.path",
    "data.loader",
    "data.workers",
    "profile.steps",
    "perceptual.vgg_path",
    "perceptual.lpips_path",
    "optim.nonfinite",
    *(
        f"train.{key}"
        for key in (
            "steps",
            "device",
            "log_every",
            "checkpoint_every",
            "keep_every",
            "picture_every",
            "out",
            "wandb",
            "deterministic",
        )
    ),
    *("train.evaluate_every", "train.evaluate_epochs"),
    *(f"parallel.{key.name}" for key in fields(ParallelConfig)),
    *(f"sampling.{key.name}" for key in fields(SamplingConfig)),
    *(f"evaluation.{key.name}" for key in fields(EvaluationConfig)),
}
"""Settings that a resumed run may change: they do not change what a step computes."""


def find_start(checkpoints: Checkpoints, folder: Path, config: Config, resume: bool) -> Checkpoint | None:
    """The checkpoint to go on from, if there is one and it is asked for."""
    if resume:
        found = checkpoints.find()
        if found:
            check_same_settings(found.config, config)
        return found
    require(
        not (step_folders(checkpoints.folder) or (folder / "config.yaml").exists()),
        f"{folder} holds a run already; continue it with --resume or choose another folder with train.out=FOLDER",
    )
    return None


def hold(folder: Path) -> TextIO:
    """Make a run's folder this process's own, see `unite_fast.utils.file_lock.hold`.

    Raises:
        UserError: another process trains in it; no permission.
    """
    return file_lock.hold(folder, "being trained", "choose another folder with train.out=FOLDER")


def write_config(folder: Path, config: Config) -> None:
    with writing(folder / "config.yaml"):
        (folder / "config.yaml").write_text(yaml.safe_dump(to_tree(config), sort_keys=False))


def check_same_settings(before: Config, now: Config) -> None:
    old, new = flatten(to_tree(before)), flatten(to_tree(now))
    for key, value in new.items():
        require(
            old[key] == value or key in FREE_ON_RESUME,
            f"cannot resume: {key} is {value} now and was {old[key]} in the run; give the same settings as then",
        )


def flatten(tree: dict, path: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return flat


def restarted(folder: Path, peers: Peers) -> bool:
    """Whether torchrun started these processes again, to go on with what they began. Not so if they never came as far
    as that, say because the folder holds another run."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    # Each machine's torchrun counts for itself, and not all of them see the folder's last change at once.
    return bool(peers.start_max(again).result() and peers.start_max(read_status(folder) == running()).result())


def running() -> str:
    """A run's status until it has ended."""
    return f"running under torchrun {launch_name()}" if under_torchrun() else "running"


def ended(step: int, stopped_by: int) -> str:
    """A run's status from then on."""
    return f"stopped at step {step} by {signal.Signals(stopped_by).name}" if stopped_by else f"finished at step {step}"


def read_status(folder: Path) -> str:
    path = folder / "status"
    return path.read_text().strip() if path.exists() else ""


def write_status(folder: Path, status: str) -> None:
    with writing_aside(folder / "status") as partial:
        partial.write_text(status + "\n")
