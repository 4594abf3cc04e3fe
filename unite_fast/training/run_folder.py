"""Run folder: checks for start and resume, the saved config, the status file, where it is."""

import os
import secrets
import signal
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TextIO

import yaml

from unite_fast.checkpoint.folders import step_folders
from unite_fast.checkpoint.manager import Checkpoints
from unite_fast.checkpoint.progress import check_progress
from unite_fast.checkpoint.reader import Checkpoint
from unite_fast.config import Config, EvaluationConfig, ParallelConfig, SamplingConfig
from unite_fast.data_pipeline import Source
from unite_fast.data_pipeline.image_folder import FolderSource
from unite_fast.distributed.agent import launch_name, under_torchrun
from unite_fast.distributed.environment import restart_count
from unite_fast.distributed.hosts import name_ranks
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import CommonError, UserError, require
from unite_fast.recipes import to_tree
from unite_fast.utils import file_lock
from unite_fast.utils.files import PARTIAL, clear_partial, home_path, read_small, save_text, writing

FREE_ON_RESUME = {
    "name",
    "data.path",
    "data.loader",
    "data.workers",
    "profile.steps",
    "perceptual.vgg_path",
    "perceptual.lpips_path",
    "optim.nonfinite",
    # What the schedule was counted in, and a length that train.steps replaces. Its points and rates must be the same.
    *("schedule.unit", "schedule.steps"),
    *(
        f"train.{key}"
        for key in (
            "steps",
            "device",
            "log_every",
            "checkpoint_every",
            "checkpoint_minutes",
            "keep_every",
            "picture_every",
            "out",
            "wandb",
            "deterministic",
            "cuda_graph",
        )
    ),
    *("train.evaluate_every", "train.evaluate_epochs"),
    *(f"parallel.{key.name}" for key in fields(ParallelConfig)),
    *(f"sampling.{key.name}" for key in fields(SamplingConfig)),
    *(f"evaluation.{key.name}" for key in fields(EvaluationConfig)),
}
"""Settings that may change on resume: they do not change what a step computes."""


REPLACED_FILES = ("status", "metrics.jsonl", "samples.png", "reconstructions.png", "curves.png")
"""Files of a run besides config.yaml that it replaces or shortens."""
SHARED_SECONDS = 5.0
"""Seconds until all machines must see a new file of rank 0."""
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
"""First word of the status: the run has all its steps; all ranks saved and stopped early; a mistake of the user."""
LONGEST_STATUS = 1000
"""Bytes of the status file."""


def find_start(checkpoints: Checkpoints, config: Config) -> Checkpoint | None:
    """The checkpoint to resume from; None if the run has none.

    Raises:
        UserError: other settings than the run's; no intact checkpoint.
    """
    checkpoint = checkpoints.find()
    if checkpoint:
        check_same_settings(checkpoint.config, config)
        check_progress(checkpoint.progress, checkpoint.path)
    return checkpoint


def check_new(folder: Path) -> None:
    """Check a folder in which a run is to start.

    Raises:
        UserError: it contains a run, or files that this run would replace.
    """
    run = step_folders(folder / "checkpoints") or (folder / "config.yaml").exists()
    require(
        not run,
        f"{folder} already contains a run; resume it with --resume or choose another folder with train.out=FOLDER",
    )
    for name in REPLACED_FILES:
        file = folder / name
        if name == "status" and read_status(folder).startswith(FAILED):
            continue  # of a start that failed before there was a run
        require(not file.exists(), f"{file} is in the way; move it, or choose another folder with train.out=FOLDER")


def choose_folder(config: Config) -> Path:
    """The run folder: `train.out`, or runs/NAME.

    Raises:
        UserError: a name that leads elsewhere; a folder in a run's checkpoints.
    """
    if config.train.out:
        folder = home_path(config.train.out)
    else:
        plain = config.name not in (".", "..") and config.name.isprintable() and "/" not in config.name
        require(plain, f"name is {config.name!r}: give one without / and control characters, or set train.out=FOLDER")
        folder = Path("runs") / config.name
    for part in (folder, *folder.parents):
        if part.name == "checkpoints" and step_folders(part):
            raise UserError(f"{folder} is not a run, but in the checkpoints of one; set train.out={part.parent}")
    return folder


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Check that all machines see the same run folder: rank 0 makes a file, and the others look for it.

    Raises:
        CommonError: a machine does not see it.
    """
    if ranks.nodes == 1:
        return
    name, made = ranks.run_on_first(lambda: _make_token(folder))
    try:
        seen = ranks.gather(_appears(folder / name))
    finally:
        if ranks.main:
            with suppress(OSError):
                (folder / name).unlink()
                if made:
                    folder.rmdir()
    missing = [rank for rank, there in enumerate(seen) if not there]
    if missing:
        raise CommonError(
            f"the run folder {folder.absolute()} is not the same on all machines: a file that {name_ranks([0])} makes "
            f"does not appear for {name_ranks(missing)}; set train.out to a folder on a file system that all share"
        )


def _make_token(folder: Path) -> tuple[str, bool]:
    """Name of a new file in the folder, and whether the folder is new."""
    with writing(folder):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        name = f".unite_fast-start-{secrets.token_hex(8)}{PARTIAL}"
        (folder / name).touch()
    return name, made


def _appears(file: Path) -> bool:
    """Whether a file is there within `SHARED_SECONDS`: a network file system may show it late."""
    deadline = time.monotonic() + SHARED_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
        for folder in (file.parent.parent, file.parent):
            # NFS asks the server again when a folder is opened; until then it may remember that there was no such name.
            with suppress(OSError):
                os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
    return True


def check_apart(folder: Path, source: Source) -> None:
    """Check that the pictures of a run do not become training images.

    Raises:
        UserError: the run folder is in the folder of the class folders.
    """
    if isinstance(source, FolderSource):
        data = source.root.resolve()
        inside = data in (folder.resolve(), *folder.resolve().parents)
        require(
            not inside, f"the run folder {folder} is among the images in {data}; set train.out to a folder elsewhere"
        )


class OpenFolder:
    """The run folder while its run goes on: locked, and found again after somebody moved or deleted it. Only rank 0 has
    one.

    Attributes:
        path: where it is.
        moves: how often it was moved or deleted.
    """

    def __init__(self, path: Path, config: Config, lock: TextIO | None = None):
        """Lock the folder, delete what a killed process was writing, and write config.yaml and status.

        Args:
            lock: from `lock_run`, if the folder is locked already.

        Raises:
            UserError: another process trains in it, no permission, or no space.
        """
        self.path, self.config, self.moves = path, config, 0
        self._open(lock or lock_run(path))

    def _open(self, lock: TextIO) -> None:
        self.lock = lock
        self.descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for name in ("", "samples", "reconstructions", "evaluation", "profile"):
            clear_partial(self.path / name)
        write_config(self.path, self.config)
        write_status(self.path, running_status())

    def follow(self) -> str:
        """Look where the folder is. A deleted one is made again.

        Returns:
            A line for the console if it was moved or deleted since the last call; else empty.

        Raises:
            UserError: see `__init__`; only for a deleted one.
        """
        found, before = self._find(), self.path
        if found == before:
            return ""
        self.moves += 1
        if found is not None:
            self.path = found
            return f"warning: the run folder {before} was moved; the run goes on in {found}"
        lock = lock_run(self.path)
        self.close()
        self._open(lock)
        return f"warning: the run folder {before} was deleted; the run goes on in a new one"

    def _find(self) -> Path | None:
        """Where the folder is now; None if it was deleted."""
        with suppress(OSError):
            if os.path.samestat(self.path.stat(), os.fstat(self.descriptor)):
                return self.path
        with suppress(OSError):  # Linux tells the name of an open folder
            moved = Path(os.readlink(f"/proc/self/fd/{self.descriptor}"))
            if os.path.samestat(moved.stat(), os.fstat(self.descriptor)):
                return moved
        return None

    def close(self) -> None:
        self.lock.close()
        os.close(self.descriptor)


def lock_run(folder: Path) -> TextIO:
    """Lock the run folder for this process; see `unite_fast.utils.file_lock.lock_folder`.

    Raises:
        UserError: another process trains in it, or no permission.
    """
    return file_lock.lock_folder(folder, "being trained", "choose another folder with train.out=FOLDER")


def write_config(folder: Path, config: Config) -> None:
    save_text(yaml.safe_dump(to_tree(config), sort_keys=False), folder / "config.yaml")


def check_same_settings(before: Config, now: Config) -> None:
    """
    Raises:
        UserError: a setting differs that must not change on resume (see `FREE_ON_RESUME`).
    """
    old, new = flatten(to_tree(before)), flatten(to_tree(now))
    for key, value in new.items():
        require(
            old[key] == value or key in FREE_ON_RESUME,
            f"cannot resume: {key} is {value} now and was {old[key]} in the run; use the settings of the run",
        )


def flatten(tree: dict, path: str = "") -> dict:
    """Nested settings as one dict with dotted keys."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return flat


def restarted(folder: Path, ranks: Ranks) -> bool:
    """Whether torchrun restarted this run, which then resumes. False if this launch never started the run, for example
    because the folder contains another one, or if a signal stopped it."""
    restart = restart_count() > 0
    # One rank's yes is enough: each machine's torchrun has its own count, and some may see an older state of
    # the folder.
    status = read_status(folder)
    ours = status == running_status() or status.endswith(f"; was {running_status()}")  # `orphaned_status`
    answers = ranks.gather((restart, ours))
    return all(any(answer) for answer in zip(*answers, strict=True))


def running_status() -> str:
    return f"running under torchrun {launch_name()}" if under_torchrun() else "running"


def final_status(step: int, stopped_by: int) -> str:
    """Status after the run: stopped by a signal, or finished (`stopped_by` is 0)."""
    return (
        f"{STOPPED} at step {step} by {signal.Signals(stopped_by).name}" if stopped_by else f"{FINISHED} at step {step}"
    )


def orphaned_status(step: int, orphan: int) -> str:
    """Status after all saved and stopped because the torchrun of the rank `orphan` has ended."""
    return f"{STOPPED} at step {step} by the end of torchrun of {name_ranks([orphan])}; was {running_status()}"


def failed_status(step: int, mistake: str) -> str:
    """Status after a mistake of the user, which a restart would repeat."""
    return f"{FAILED} at step {step}: {mistake}"[:LONGEST_STATUS]


def note_failed_start(config: Config, mistake: str) -> None:
    """Note a mistake in the status of the run to resume, before it runs again; a job script then does not repeat it.
    Not if another process trains there or the run has finished, and never an error."""
    with suppress(UserError, OSError), lock_run(folder := choose_folder(config)):
        if not read_status(folder).startswith(FINISHED):
            write_status(folder, failed_status(0, mistake))


def read_status(folder: Path) -> str:
    try:
        return read_small(folder / "status", LONGEST_STATUS).decode(errors="replace").strip()
    except OSError:
        return ""


def write_status(folder: Path, status: str) -> None:
    save_text(status + "\n", folder / "status")
