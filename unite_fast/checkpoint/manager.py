"""Checkpoints through torch.distributed.checkpoint (DCP): one way for any number of processes.

Every process writes parts of tensors that it holds, each part once over all processes, as safetensors; a checkpoint can
be read by any number of processes under any sharding. DCP's usual storage pickles its metadata, and reading that could
run code of the file's; the safetensors storage derives it from the headers of its files. What files there are is in
`checkpoint_files.py`.
"""

import json
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
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

from unite_fast.checkpoint import format as files
from unite_fast.checkpoint.format import DamagedCheckpoint, Manifest
from unite_fast.checkpoint.reader import Checkpoint, find_good
from unite_fast.config import Config
from unite_fast.distributed.dtensor import local
from unite_fast.distributed.process_group import Ranks, current_ranks
from unite_fast.errors import UserError

# DCP remarks on every save and load of one process that there is only one. For the whole program and not around the
# calls: they run in a thread, and filters that a thread sets are everybody's.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


class Checkpoints:
    """A run's checkpoints. In a process group every call is made by all ranks.

    A save copies the tensors and returns; a thread writes them. The next call waits for it, and raises its error. The
    folder must be one that all ranks see.
    """

    def __init__(self, folder: Path, keep_every: int):
        self.folder, self.keep_every = folder, keep_every
        # A group of its own: a save runs beside the steps, whose collectives must not mix with its own.
        self.ranks = current_ranks().with_own_group()
        self.copies: dict[str, Tensor] = {}
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future | None = None
        self.ranks.run_on_first(lambda: files.repair(folder))

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
        if not self.ranks.run_on_first(lambda: files.step_folders(self.folder)):
            return None
        return find_good(self.folder, self.ranks)

    def load_into(self, found: Checkpoint, tensors: dict[str, Tensor]) -> None:
        """Copy a checkpoint's values into `tensors`; each rank reads what it holds of them.

        Raises:
            UserError: names a tensor that is missing, that `tensors` has no place for, or of another shape or dtype.
        """
        self.wait()
        _load(found.path, tensors, _StrictPlanner(), self.ranks)

    def all_finite(self, tensors: dict[str, Tensor]) -> bool:
        """Whether every value of every rank is a number."""
        self.wait()
        finite = torch.stack([local(tensor).isfinite().all() for tensor in tensors.values()]).all()
        return all(self.ranks.run_on_all(lambda: bool(finite)))

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
        path, ranks = files.step_path(self.folder, manifest.step), self.ranks
        partial = files.partial_of(path)
        try:
            ranks.run_on_first(lambda: files.make_empty(partial))
            writer = _ShardWriter(partial)
            _save(tensors, self.copies, writer, ranks)
            parts = ranks.run_on_all(lambda: [files.read_shard(shard) for shard in writer.written])
            manifest.shards = [shard for part in parts for shard in part]
            ranks.run_on_first(lambda: self._finish(partial, path, manifest))
        except (OSError, DamagedCheckpoint) as error:
            raise UserError(
                f"could not save {path}: {files.reason_of(error)}; checkpoints saved before are untouched"
            ) from error
        finally:
            # After a success it is gone already. On a full disk it would take the room that the next try needs.
            if ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)

    def _finish(self, partial: Path, path: Path, manifest: Manifest) -> None:
        files.write_manifest(partial, manifest)
        files.check_sizes(partial, manifest.shards)
        files.commit(partial, path)
        files.prune(self.folder, self.keep_every, manifest.step)


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

    def __init__(self, folder: Path, ranks: Ranks):
        super().__init__(str(folder))
        self.ranks = ranks

    def read_metadata(self) -> Metadata:
        return self.ranks.run_on_first(super().read_metadata)


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


def _save(tensors: dict[str, Tensor], copies: dict[str, Tensor], writer: _ShardWriter, ranks: Ranks) -> None:
    planner = _HostCopies(copies)
    try:
        dcp.save(tensors, storage_writer=writer, planner=planner, process_group=ranks.group, no_dist=ranks.world == 1)
    except CheckpointException as error:
        raise _first_failure(error) from None


def _load(path: Path, tensors: dict[str, Tensor], planner: DefaultLoadPlanner, ranks: Ranks) -> None:
    reader = _ShardReader(path, ranks)
    try:
        dcp.load(tensors, storage_reader=reader, planner=planner, process_group=ranks.group, no_dist=ranks.world == 1)
    except CheckpointException as error:
        failure = _first_failure(error)
        raise UserError(f"the checkpoint {path} cannot be loaded: {files.reason_of(failure)}") from failure


def _first_failure(error: CheckpointException) -> BaseException:
    """What went wrong on the first of the ranks on which something did."""
    return error.failures[min(error.failures)][0]
