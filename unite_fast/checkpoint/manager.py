"""Saving and loading checkpoints, for any number of ranks.

Every shard is written once over all ranks, as safetensors; save_plan.py says by which. torch.distributed.checkpoint
(DCP) loads: a checkpoint saved on N ranks loads on any M, under any sharding. DCP's default storage pickles its
metadata, which could execute code on loading; its safetensors storage derives the metadata from the headers. format.py
describes the files.
"""

import itertools
import json
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    HuggingFaceStorageReader,
    Metadata,
    TensorStorageMetadata,
    load,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem

from unite_fast.checkpoint import folders
from unite_fast.checkpoint import format as files
from unite_fast.checkpoint.format import DamagedCheckpoint, Manifest, Shard
from unite_fast.checkpoint.reader import OFFSETS, SHARDING_INFO, Checkpoint, find_intact, list_parts
from unite_fast.checkpoint.replicas import check_replicas
from unite_fast.checkpoint.save_plan import SavePlan, layout_of, mesh_of, plan_save
from unite_fast.config import Config
from unite_fast.distributed.dtensor import local
from unite_fast.distributed.process_group import Ranks, current_ranks
from unite_fast.errors import TemporaryError, UserError, reason_of

# DCP warns on every load in a single process. The filter is set once, not around each call: all threads share the
# filters.
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
            UserError: the previous save failed: no space left, or no permission. `ReplicasDiffer`: the state of some
                ranks is damaged.
        """
        self.wait()
        check_replicas(tensors, self.ranks, step)
        layouts = {name: layout_of(tensor) for name, tensor in tensors.items()}
        plan = plan_save(layouts, mesh_of(tensors, self.ranks.world), self.ranks.rank)
        self._copy({name: tensors[name] for name in plan.staged(self.ranks.rank)})
        self.writing = self.writer.submit(self._write, Manifest(config, step, progress, []), plan)

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
        """Copy this rank's shards to CPU buffers, which later saves of the same tensors reuse. Pinned for tensors on a
        GPU, so that all copies run asynchronously."""
        for name, tensor in tensors.items():
            shard = local(tensor).detach()
            if name not in self.copies:
                self.copies[name] = torch.empty(shard.shape, dtype=shard.dtype, pin_memory=shard.is_cuda)
            self.copies[name].copy_(shard, non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def _write(self, manifest: Manifest, plan: SavePlan) -> None:
        """Runs in the thread, on all ranks. It succeeds on all or fails on all."""
        path, ranks = folders.step_path(self.folder, manifest.step), self.ranks
        partial = folders.partial_path(path)
        try:
            ranks.run_on_first(lambda: folders.make_empty(partial))
            manifest.shards = self._write_shards(partial, plan)
            ranks.run_on_first(lambda: self._finish(partial, path, manifest))
        except (OSError, DamagedCheckpoint) as error:
            # A full disk may be emptied, and a file server may come back.
            raise TemporaryError(
                f"could not save {path}: {reason_of(error)}; earlier checkpoints are untouched"
            ) from error
        finally:
            # After a success `partial` is already renamed; after a failure it takes space that the next save needs.
            if ranks.main:
                shutil.rmtree(partial, ignore_errors=True)

    def _write_shards(self, folder: Path, plan: SavePlan) -> list[Shard]:
        """Returns the files of all ranks."""
        tensors = self._collect(plan)
        by_rank = self.ranks.run_on_all(lambda: _write_file(folder, plan, tensors, self.ranks.rank))
        return [shard for shards in by_rank for shard in shards]

    def _collect(self, plan: SavePlan) -> dict[str, Tensor]:
        """The tensors of the file that this rank writes, if it writes one. Its memory beside the copies, only if ranks
        share the file: the file, and one rank's shard of a tensor."""
        ranks, writer = self.ranks, plan.ranks[0]
        tensors: dict[str, Tensor] = {}

        def allocate() -> None:
            for entry in plan.entries if ranks.rank == writer else ():
                copy = self.copies[entry.name]
                tensors[entry.name] = torch.empty(entry.shape, dtype=copy.dtype) if entry.divided else copy

        # Before any rank sends: a writer that fails here must not leave the others waiting for it.
        ranks.run_on_all(allocate)
        for entry in (entry for entry in plan.entries if entry.divided):
            starts = itertools.accumulate(entry.sizes, initial=0)
            for member, start, size in zip(plan.ranks, starts, entry.sizes, strict=False):
                if ranks.rank == writer:
                    part = tensors[entry.name].narrow(entry.dim, start, size)
                    part.copy_(self.copies[entry.name] if member == writer else _receive(part, member, ranks))
                elif ranks.rank == member and size:
                    distributed.send(_bytes(self.copies[entry.name]), writer, ranks.group)
        return tensors

    def _finish(self, partial: Path, path: Path, manifest: Manifest) -> None:
        files.write_manifest(partial, manifest)
        files.check_sizes(partial, manifest.shards)
        folders.commit(partial, path)
        folders.prune(self.folder, self.keep_every, manifest.step)


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


def _receive(part: Tensor, sender: int, ranks: Ranks) -> Tensor:
    received = torch.empty(part.shape, dtype=part.dtype)
    if received.numel():
        distributed.recv(_bytes(received), sender, ranks.group)
    return received


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory, because gloo does not know all dtypes."""
    return tensor.flatten().view(torch.uint8)


def _write_file(folder: Path, plan: SavePlan, tensors: dict[str, Tensor], rank: int) -> list[Shard]:
    """Write this rank's file, and read it back for its checksum."""
    if not tensors:
        return []
    path = folder / f"shard_{rank + 1:05d}.safetensors"
    offsets = {entry.name: {OFFSETS: entry.offsets} for entry in plan.entries}
    files.save_safetensors(tensors, path, {SHARDING_INFO: json.dumps(offsets)})
    return [files.read_shard(path)]


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
