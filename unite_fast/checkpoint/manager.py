"""Saving and loading checkpoints with torch.distributed.checkpoint (DCP), for any number of ranks.

Each rank writes the shards that it holds as safetensors, every shard once over all ranks. A checkpoint saved on N ranks
loads on any M, under any sharding. DCP's default storage pickles its metadata, which could execute code on loading; its
safetensors storage derives the metadata from the headers. format.py describes the files.
"""

import json
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    Metadata,
    SavePlan,
    SavePlanner,
    TensorStorageMetadata,
    load,
    save,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem

from unite_fast.checkpoint import folders
from unite_fast.checkpoint import format as files
from unite_fast.checkpoint.format import DamagedCheckpoint, Manifest
from unite_fast.checkpoint.reader import OFFSETS, SHARDING_INFO, Checkpoint, find_intact, list_parts
from unite_fast.config import Config
from unite_fast.distributed.dtensor import local
from unite_fast.distributed.process_group import Ranks, current_ranks
from unite_fast.errors import UserError, reason_of

# DCP warns on every save and load in a single process. The filter is set once, not around each call: all threads share
# the filters, and saves run in a background thread.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


class Checkpoints:
    """The checkpoints of a run. All ranks make each call together.

    `save` copies the tensors and returns; a thread writes them. The next call waits for the thread and raises its
    error. The folder must be on storage that all ranks see.
    """

    def __init__(self, folder: Path, keep_every: int):
        self.folder, self.keep_every = folder, keep_every
        # Its own group, because a save runs beside the training steps and their collectives.
        self.ranks = current_ranks().with_own_group()
        self.copies: dict[str, Tensor] = {}
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future | None = None
        self.ranks.run_on_first(lambda: folders.repair(folder))

    def save(self, step: int, config: Config, progress: dict, tensors: dict[str, Tensor]) -> None:
        """Start a save, once the previous one is done. The tensors may change after this returns.

        Args:
            progress: JSON content; rank 0's is written.
            tensors: plain tensors, equal on all ranks, or DTensors.

        Raises:
            UserError: the previous save failed: no space left, or no permission.
        """
        self.wait()
        self._copy(tensors)
        # The thread reads only sizes and placements of `tensors`; values, strides and devices come from the copies.
        self.writing = self.writer.submit(self._write, Manifest(config, step, progress, []), tensors)

    def wait(self) -> None:
        """Wait until the last save is on disk.

        Raises:
            UserError: the save failed.
        """
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def close(self) -> None:
        """`wait`, then release the copies."""
        try:
            self.wait()
        finally:
            self.writer.shutdown()
            self.copies = {}

    def find(self) -> Checkpoint | None:
        """The run's newest intact checkpoint, without its tensors; None if the run has no checkpoint.

        Raises:
            UserError: all checkpoints are damaged.
        """
        self.wait()
        if not self.ranks.run_on_first(lambda: folders.step_folders(self.folder)):
            return None
        return find_intact(self.folder, self.ranks)

    def load_into(self, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
        """Load a checkpoint into `tensors`, in place; each rank reads its own shards.

        Raises:
            UserError: a tensor is missing, unknown, or has another shape or dtype; a value is not finite.
        """
        self.wait()
        _load(checkpoint, tensors, _StrictPlanner(), self.ranks)
        if not self.all_finite(tensors):
            raise UserError(f"the checkpoint {checkpoint.path} holds values that are not finite")

    def all_finite(self, tensors: dict[str, Tensor]) -> bool:
        """Whether all values on all ranks are finite."""
        self.wait()
        finite = torch.stack([local(tensor).isfinite().all() for tensor in tensors.values()]).all()
        return all(self.ranks.run_on_all(lambda: bool(finite)))

    def _copy(self, tensors: dict[str, Tensor]) -> None:
        """Copy this rank's shards to CPU buffers, which later saves reuse. Pinned for tensors on a GPU, so that all
        copies run asynchronously."""
        for name, tensor in tensors.items():
            shard = local(tensor).detach()
            if name not in self.copies:
                self.copies[name] = torch.empty(shard.shape, dtype=shard.dtype, pin_memory=shard.is_cuda)
            self.copies[name].copy_(shard, non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def _write(self, manifest: Manifest, tensors: dict[str, Tensor]) -> None:
        """Runs in the thread, on all ranks. It succeeds on all or fails on all."""
        path, ranks = folders.step_path(self.folder, manifest.step), self.ranks
        partial = folders.partial_path(path)
        try:
            ranks.run_on_first(lambda: folders.make_empty(partial))
            writer = _ShardWriter(partial)
            _save(tensors, self.copies, writer, ranks)
            by_rank = ranks.run_on_all(lambda: [files.read_shard(path) for path in writer.written])
            manifest.shards = [shard for shards in by_rank for shard in shards]
            ranks.run_on_first(lambda: self._finish(partial, path, manifest))
        except (OSError, DamagedCheckpoint) as error:
            raise UserError(f"could not save {path}: {reason_of(error)}; earlier checkpoints are untouched") from error
        finally:
            # After a success `partial` is already renamed; after a failure it takes space that the next save needs.
            if ranks.main:
                shutil.rmtree(partial, ignore_errors=True)

    def _finish(self, partial: Path, path: Path, manifest: Manifest) -> None:
        files.write_manifest(partial, manifest)
        files.check_sizes(partial, manifest.shards)
        folders.commit(partial, path)
        folders.prune(self.folder, self.keep_every, manifest.step)


class _HostCopies(DefaultSavePlanner):
    """Plans the save from the tensors, and writes their copies on the CPU."""

    def __init__(self, copies: dict[str, Tensor]):
        super().__init__(flatten_state_dict=False)
        self.copies = copies

    def lookup_object(self, index) -> Tensor:
        return self.copies[index.fqn]


class _ShardWriter(HuggingFaceStorageWriter):
    """Writes one file per rank, directly from the tensors' memory.

    The base class builds the whole file in memory, twice, and holds the GIL meanwhile: for 1 GiB the training loop
    stood still for 2 to 3 s, with this class for at most 0.06 s (CPU, busy machine).
    """

    def __init__(self, folder: Path):
        super().__init__(str(folder), save_distributed=True)
        self.folder = folder
        self.written: list[Path] = []

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list]:
        if plan.items:  # a replica has nothing to write: other ranks write the same shards
            path = self.folder / f"shard_{plan.storage_data['shard_index']:05d}.safetensors"
            shards, offsets = {}, {}
            for item in plan.items:
                name, shard = item.index.fqn, planner.resolve_data(item)
                assert isinstance(shard, Tensor) and item.tensor_data is not None  # `save` passes tensors only
                shards[name], offsets[name] = shard.contiguous(), {OFFSETS: item.tensor_data.chunk.offsets}
            files.save_safetensors(shards, path, {SHARDING_INFO: json.dumps(offsets)})
            self.written = [path]
        done = torch.futures.Future()
        done.set_result([])
        return done


class _Listing(FileSystem):
    """Lists these files only: the base class of the reader reads every safetensors file of a folder."""

    def __init__(self, shards: list[Path]):
        self.shards = shards

    def ls(self, path: str | os.PathLike) -> list[str]:
        return [str(shard) for shard in self.shards]


class _ShardReader(HuggingFaceStorageReader):
    """Rank 0 reads the headers of the manifest's files for all ranks."""

    def __init__(self, checkpoint: Checkpoint, ranks: Ranks):
        super().__init__(str(checkpoint.path))
        self.ranks = ranks
        self.folder, self.shards = checkpoint.path, [checkpoint.path / shard.name for shard in checkpoint.shards]
        self.fs = _Listing(self.shards)

    def read_metadata(self) -> Metadata:
        return self.ranks.run_on_first(self._checked_metadata)

    def _checked_metadata(self) -> Metadata:
        list_parts(self.folder, self.shards)
        return super().read_metadata()


class _StrictPlanner(DefaultLoadPlanner):
    """Requires the same names, shapes and dtypes in checkpoint and state."""

    def __init__(self):
        super().__init__(flatten_state_dict=False)

    def create_local_plan(self):
        assert self.metadata is not None  # DCP sets it before planning
        stored = self.metadata.state_dict_metadata
        missing = [name for name in self.state_dict if name not in stored]
        unknown = [name for name in stored if name not in self.state_dict]
        if missing:
            raise UserError(f"{missing[0]} is missing")
        if unknown:
            raise UserError(f"{unknown[0]} is unknown here")
        for name, tensor in self.state_dict.items():
            saved = stored[name]
            assert isinstance(saved, TensorStorageMetadata)  # safetensors holds tensors only
            if saved.size != tensor.shape:
                raise UserError(f"{name} is {list(saved.size)}, not {list(tensor.shape)}")
            if saved.properties.dtype != tensor.dtype:
                raise UserError(f"{name} is {saved.properties.dtype}, not {tensor.dtype}")
        return super().create_local_plan()


def _save(tensors: dict[str, Tensor], copies: dict[str, Tensor], writer: _ShardWriter, ranks: Ranks) -> None:
    planner = _HostCopies(copies)
    try:
        save(tensors, storage_writer=writer, planner=planner, process_group=ranks.group, no_dist=ranks.world == 1)
    except CheckpointException as error:
        raise _first_failure(error) from None


def _load(checkpoint: Checkpoint, tensors: dict[str, Tensor], planner: DefaultLoadPlanner, ranks: Ranks) -> None:
    reader = _ShardReader(checkpoint, ranks)
    try:
        load(tensors, storage_reader=reader, planner=planner, process_group=ranks.group, no_dist=ranks.world == 1)
    except CheckpointException as error:
        failure = _first_failure(error)
        raise UserError(f"the checkpoint {checkpoint.path} cannot be loaded: {reason_of(failure)}") from failure


def _first_failure(error: CheckpointException) -> BaseException:
    """The error of the lowest rank that failed."""
    return error.failures[min(error.failures)][0]
