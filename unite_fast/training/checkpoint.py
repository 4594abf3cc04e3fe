"""Checkpoints through torch.distributed.checkpoint (DCP): one way for any number of processes.

Every process writes parts of tensors that it holds, each part once over all processes, as safetensors; a checkpoint can
be read by any number of processes under any sharding. DCP's usual storage pickles its metadata, and reading that could
run code of the file's; the safetensors storage derives it from the headers of its files. What files there are is in
`checkpoint_files.py`.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    Metadata,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.api import CheckpointException

from unite_fast.config import Config
from unite_fast.errors import UserError
from unite_fast.sharding import local
from unite_fast.training import checkpoint_files as files
from unite_fast.training.checkpoint_files import DamagedCheckpoint, Manifest

# DCP remarks on every save and load of one process that there is only one. For the whole program and not around the
# calls: they run in a thread, and filters that a thread sets are everybody's.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


@dataclass
class Checkpoint:
    path: Path
    config: Config
    step: int
    progress: dict
    """What `Trainer` needs to go on and no tensor holds."""
    tensors: dict[str, Tensor]


class Team:
    """The processes that save or load together; one alone is a team too.

    It has a group of its own, on the CPU: a save runs beside the steps, whose collectives must not mix with its own.
    """

    def __init__(self, alone: bool = False):
        self.alone = alone or not dist.is_initialized()
        self.group = None if self.alone else dist.new_group(backend="gloo")
        self.rank = 0 if self.alone else dist.get_rank()
        self.size = 1 if self.alone else dist.get_world_size()

    def together(self, work: Callable[[], Any]) -> list:
        """What `work` gave on each rank; where it fails on any, all raise that error.

        Raises:
            Exception: the first one's that failed.
        """
        try:
            outcome = (True, work())
        except (UserError, OSError) as error:
            outcome = (False, error)
        except Exception as error:
            # Whatever it is, it can be sent: an error that cannot would leave the others waiting.
            outcome = (False, RuntimeError(f"{type(error).__name__}: {error}"))
        outcomes = [outcome]
        if not self.alone:
            outcomes = [None] * self.size
            dist.all_gather_object(outcomes, outcome, group=self.group)
        for succeeded, result in outcomes:
            if not succeeded:
                raise result
        return [result for _, result in outcomes]

    def first(self, work: Callable[[], Any]) -> Any:
        """What `work` gave on rank 0, which alone runs it."""
        return self.together(lambda: work() if self.rank == 0 else None)[0]


class Checkpoints:
    """A run's checkpoints. In a process group every call is made by all ranks.

    A save copies the tensors and returns; a thread writes them. The next call waits for it, and raises its error. The
    folder must be one that all ranks see.
    """

    def __init__(self, folder: Path, keep_every: int):
        self.folder, self.keep_every = folder, keep_every
        self.team = Team()
        self.copies: dict[str, Tensor] = {}
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future | None = None
        self.team.first(lambda: files.repair(folder))

    def save(self, step: int, config: Config, progress: dict, tensors: dict[str, Tensor]) -> None:
        """Begin to save, after the save before this one is done. The tensors may change when this returns.

        Args:
            progress: what JSON can hold; rank 0's is written.
            tensors: plain ones, equal on all ranks, or DTensors.

        Raises:
            UserError: the save before this one failed: no space left, or no permission to write.
        """
        self.wait()
        self._copy(tensors)
        # Only sizes and places are read from `tensors` by the thread; strides, values and devices are the copies'.
        self.writing = self.writer.submit(self._write, Manifest(config, step, progress, []), tensors)

    def wait(self) -> None:
        """Until what was saved is on the disk.

        Raises:
            UserError: it could not be saved.
        """
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def close(self) -> None:
        """Wait, and release the copies. See `wait`."""
        try:
            self.wait()
        finally:
            self.writer.shutdown()
            self.copies = {}

    def find(self) -> Checkpoint | None:
        """The run's newest undamaged checkpoint, without its tensors; None in a run that has none.

        Raises:
            UserError: it has some, all of them damaged.
        """
        self.wait()
        if not self.team.first(lambda: files.step_folders(self.folder)):
            return None
        return find_good(self.folder, self.team)

    def load_into(self, found: Checkpoint, tensors: dict[str, Tensor]) -> None:
        """Copy a checkpoint's values into `tensors`; each rank reads what it holds of them.

        Raises:
            UserError: names a tensor that is missing, that `tensors` has no place for, or of another shape or dtype.
        """
        self.wait()
        _load(found.path, tensors, _StrictPlanner(), self.team)

    def all_finite(self, tensors: dict[str, Tensor]) -> bool:
        """Whether every value of every rank is a number."""
        self.wait()
        finite = torch.stack([local(tensor).isfinite().all() for tensor in tensors.values()]).all()
        return all(self.team.together(lambda: bool(finite)))

    def _copy(self, tensors: dict[str, Tensor]) -> None:
        """Into memory that the next save uses again; pinned, where the tensors are on a GPU, so that all copies run at
        once."""
        for name, tensor in tensors.items():
            part = local(tensor).detach()
            if name not in self.copies:
                self.copies[name] = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
            self.copies[name].copy_(part, non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def _write(self, manifest: Manifest, tensors: dict[str, Tensor]) -> None:
        """Runs in the thread, on all ranks; on all of them it succeeds or fails."""
        path, team = files.step_path(self.folder, manifest.step), self.team
        partial = files.partial_of(path)
        try:
            team.first(lambda: files.make_empty(partial))
            writer = _ShardWriter(partial)
            _save(tensors, self.copies, writer, team)
            parts = team.together(lambda: [files.read_shard(shard) for shard in writer.written])
            manifest.shards = [shard for part in parts for shard in part]
            team.first(lambda: self._finish(partial, path, manifest))
        except (OSError, DamagedCheckpoint) as error:
            raise UserError(
                f"could not save {path}: {files.reason_of(error)}; checkpoints saved before are untouched"
            ) from error
        finally:
            # After a success it is gone already. On a full disk it would take the room that the next try needs.
            if team.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)

    def _finish(self, partial: Path, path: Path, manifest: Manifest) -> None:
        files.write_manifest(partial, manifest)
        files.check_sizes(partial, manifest.shards)
        files.commit(partial, path)
        files.prune(self.folder, self.keep_every, manifest.step)


def load_checkpoint(path: str | Path, prefixes: tuple[str, ...] = ("",)) -> Checkpoint:
    """Read a checkpoint into memory, in this process alone: its tensors whose names start with one of `prefixes`.

    Args:
        path: a checkpoint, or the folder of a run, which means its newest undamaged one.

    Raises:
        UserError: no such checkpoint, or a damaged one.
    """
    team = Team(alone=True)
    found = find_good(Path(path), team)
    stored = _ShardReader(found.path, team).read_metadata().state_dict_metadata
    found.tensors = {
        name: torch.empty(info.size, dtype=info.properties.dtype)
        for name, info in stored.items()
        if name.startswith(prefixes)
    }
    _load(found.path, found.tensors, DefaultLoadPlanner(flatten_state_dict=False), team)
    return found


def find_good(path: Path, team: Team) -> Checkpoint:
    """The checkpoint that `path` means, without tensors, after a look at all its files. Of a run, the newest undamaged
    one; each damaged one that was passed over is a warning of the logger "unite_fast.checkpoint".

    Raises:
        UserError: none there, or none undamaged. Whoever names a damaged one is told of another.
    """
    possible = team.first(lambda: files.candidates(path))
    damage: list[str] = []
    for candidate in possible:
        try:
            manifest = _check(candidate, team)
        except DamagedCheckpoint as error:
            damage.append(str(error))
            continue
        for line in damage if team.rank == 0 else ():
            files.log.warning("%s; using %s instead", line, candidate)
        return Checkpoint(candidate, manifest.config, manifest.step, manifest.progress, {})
    if possible != [path]:
        raise DamagedCheckpoint(f"{path} holds no checkpoint that is undamaged: {'; '.join(damage)}")
    other = team.first(lambda: files.other_than(path))
    raise DamagedCheckpoint(damage[0] + (f"; another one is {other}" if other else ""))


def _check(path: Path, team: Team) -> Manifest:
    """Look at every file; the ranks share the checksums."""
    manifest = team.first(lambda: files.read_manifest(path))
    team.first(lambda: files.check_sizes(path, manifest.shards))
    team.together(lambda: files.check_checksums(path, manifest.shards[team.rank :: team.size]))
    return manifest


class _HostCopies(DefaultSavePlanner):
    """Plans by the tensors, writes their copies."""

    def __init__(self, copies: dict[str, Tensor]):
        super().__init__(flatten_state_dict=False)
        self.copies = copies

    def lookup_object(self, index) -> Tensor:
        return self.copies[index.fqn]


class _ShardWriter(HuggingFaceStorageWriter):
    """Writes one file per rank, straight from the tensors' memory.

    The class it is based on first makes the whole file in memory, twice, and holds Python's lock meanwhile: with 1 GiB
    the training loop stood still for 2 to 3 s, and with this for 0.06 s at most (CPU, busy machine).
    """

    def __init__(self, folder: Path):
        super().__init__(str(folder), save_distributed=True)
        self.folder = folder
        self.written: list[Path] = []

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list]:
        if plan.items:  # a rank that only repeats what others hold has nothing to write
            path = self.folder / f"shard_{plan.storage_data['shard_index']:05d}.safetensors"
            parts = {item.index.fqn: planner.resolve_data(item).contiguous() for item in plan.items}
            places = {item.index.fqn: {SAVED_OFFSETS_KEY: item.tensor_data.chunk.offsets} for item in plan.items}
            files.save_safetensors(parts, path, {CUSTOM_METADATA_KEY: json.dumps(places)})
            self.written = [path]
        done = torch.futures.Future()
        done.set_result([])
        return done


class _ShardReader(HuggingFaceStorageReader):
    """Rank 0 reads the headers of all files, and tells the others."""

    def __init__(self, folder: Path, team: Team):
        super().__init__(str(folder))
        self.team = team

    def read_metadata(self) -> Metadata:
        return self.team.first(super().read_metadata)


class _StrictPlanner(DefaultLoadPlanner):
    """Every tensor has its place, and every place its tensor."""

    def __init__(self):
        super().__init__(flatten_state_dict=False)

    def create_local_plan(self):
        stored = self.metadata.state_dict_metadata
        missing = [name for name in self.state_dict if name not in stored]
        foreign = [name for name in stored if name not in self.state_dict]
        if missing or foreign:
            raise UserError(f"it lacks {missing[0]}" if missing else f"it holds {foreign[0]}, which has no place here")
        for name, tensor in self.state_dict.items():
            there, here = stored[name].size, tensor.shape
            if there != here:
                raise UserError(f"{name} is {list(there)}, not {list(here)}")
            if stored[name].properties.dtype != tensor.dtype:
                raise UserError(f"{name} is {stored[name].properties.dtype}, not {tensor.dtype}")
        return super().create_local_plan()


def _save(tensors: dict[str, Tensor], copies: dict[str, Tensor], writer: _ShardWriter, team: Team) -> None:
    planner = _HostCopies(copies)
    try:
        dcp.save(tensors, storage_writer=writer, planner=planner, process_group=team.group, no_dist=team.alone)
    except CheckpointException as error:
        raise _first_failure(error) from None


def _load(path: Path, tensors: dict[str, Tensor], planner: DefaultLoadPlanner, team: Team) -> None:
    reader = _ShardReader(path, team)
    try:
        dcp.load(tensors, storage_reader=reader, planner=planner, process_group=team.group, no_dist=team.alone)
    except CheckpointException as error:
        failure = _first_failure(error)
        raise UserError(f"the checkpoint {path} cannot be loaded: {files.reason_of(failure)}") from failure


def _first_failure(error: CheckpointException) -> BaseException:
    """What went wrong on the first of the ranks on which something did."""
    return error.failures[min(error.failures)][0]
