"""Work on whole matrices, of which each process holds a shard or a copy, done once and split over all processes.

The processes form a grid of R copies by S shards, as `fully_shard` on a two-dimensional mesh makes it: every matrix is
cut into S shards along one dimension, as torch.chunk cuts, and the processes of one column hold the same shard. Each
matrix has one owner on the grid. It works on whole matrices, batched by shape; the others only send and receive:

    gather      within the owner's row, every process sends the owner its shard   (all-to-all; nothing if S = 1)
    work        the owner's function, on a batch of matrices of one shape
    give back   the reverse of gather                                             (all-to-all; nothing if S = 1)
    share       within a column, each row passes on what its owners made          (all-gather; nothing if R = 1)

A bucket holds one batch of each owner, and travels as one message a pair of processes. All gathers start at once; while
a bucket is worked on, later ones still come and earlier ones go back.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

# torch 2.13 renamed it, and warns of the old name at every call.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Grid:
    """R = copies times S = shards processes, and where this one stands: in row `copy`, column `shard`."""

    copies: int = 1
    shards: int = 1
    copy: int = 0
    shard: int = 0
    row: dist.ProcessGroup | None = None
    """The processes of this row: together they hold each matrix once."""
    column: dist.ProcessGroup | None = None
    """The processes of this column: each holds the same shards."""

    @property
    def processes(self) -> int:
        return self.copies * self.shards

    @property
    def place(self) -> int:
        return self.copy * self.shards + self.shard


@dataclass(frozen=True)
class Matrix:
    """The shape of a whole matrix, and the dimension along which it is cut."""

    shape: torch.Size
    dim: int = 0

    def extent(self, shards: int, shard: int) -> tuple[int, int]:
        """Start and length of a shard along `dim`: as torch.chunk cuts, so the last ones may be shorter or empty."""
        whole = self.shape[self.dim]
        chunk = -(-whole // shards)
        start = min(shard * chunk, whole)
        return start, min(chunk, whole - start)

    def shard_shape(self, shards: int, shard: int) -> torch.Size:
        shape = list(self.shape)
        shape[self.dim] = self.extent(shards, shard)[1]
        return torch.Size(shape)


def layout(parameters: Sequence[Tensor]) -> tuple[Grid, list[Matrix]]:
    """How plain tensors (one process), or DTensors on one mesh (copies, shards), are spread.

    Raises:
        ValueError: another mesh or placement, or a mixture.
    """
    meshes = {p.device_mesh if isinstance(p, DTensor) else None for p in parameters}
    if meshes <= {None}:
        return Grid(), [Matrix(p.shape) for p in parameters]
    if len(meshes) > 1 or any(mesh is None or mesh.ndim != 2 for mesh in meshes):
        raise ValueError("give all matrices as plain tensors, or all as DTensors on one mesh of two dimensions")
    for p in parameters:
        copied, cut = p.placements
        if not isinstance(copied, Replicate) or type(cut) is not Shard:
            raise ValueError(f"a matrix is placed as {p.placements}; make it (Replicate(), Shard(dim))")
    (mesh,) = meshes
    grid = Grid(*mesh.shape, *mesh.get_coordinate(), row=mesh.get_group(1), column=mesh.get_group(0))
    return grid, [Matrix(p.shape, p.placements[1].dim) for p in parameters]


def choose_owners(shapes: Sequence[torch.Size], costs: Sequence[int], processes: int) -> list[int]:
    """The process 0 .. processes - 1 that owns each matrix.

    Greedy by longest processing time (Graham, 1969): the dearest first, each to the process with the least to do. Where
    several have equally little to do, one that has that shape already takes it, as batches are cheaper than single
    products. Depends on the arguments alone, so that all processes choose the same.
    """
    load, held = [0] * processes, [set() for _ in range(processes)]
    owners = [0] * len(shapes)
    for k in sorted(range(len(shapes)), key=lambda k: (-costs[k], shapes[k], k)):
        owner = min(range(processes), key=lambda process: (load[process], shapes[k] not in held[process], process))
        owners[k] = owner
        load[owner] += costs[k]
        held[owner].add(shapes[k])
    return owners


def batches_by_owner(shapes: Sequence[torch.Size], owners: Sequence[int], processes: int) -> list[list[list[int]]]:
    """For each bucket, for each process, the matrices of its batch: all it owns of one shape, or none."""
    batches = [defaultdict(list) for _ in range(processes)]
    for k, owner in enumerate(owners):
        batches[owner][shapes[k]].append(k)
    # Large batches first: their way back is hidden behind the smaller ones.
    ordered = [sorted(own.values(), key=lambda batch: -len(batch) * shapes[batch[0]].numel()) for own in batches]
    return [[own[i] if i < len(own) else [] for own in ordered] for i in range(max(len(own) for own in ordered))]


class Bucket:
    """One batch of each owner: who holds which part of it, and the buffers in which it travels during a step."""

    def __init__(self, matrices: Sequence[Matrix], batches: Sequence[list[int]], grid: Grid):
        self.grid = grid
        self.matrices = matrices
        self.own = batches[grid.place]
        rows = [batches[copy * grid.shards : (copy + 1) * grid.shards] for copy in range(grid.copies)]
        self.of_row = [[k for batch in row for k in batch] for row in rows]
        """The matrices of each row's owners, in the order in which `packed` holds this column's shards of them."""
        self.to_owner = [sum(self._numel(k, grid.shard) for k in batch) for batch in rows[grid.copy]]
        self.from_shard = [sum(self._numel(k, shard) for k in self.own) for shard in range(grid.shards)]
        # gloo has no all-gather of unequal parts, and NCCL makes R broadcasts of one: the shorter rows are padded.
        self.width = max(sum(self._numel(k, grid.shard) for k in row) for row in self.of_row)

    def gather(self, shards: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Start to bring this process's shards, cast to dtype, to the owners of its row."""
        self.packed = shards[0].new_empty(self.width, dtype=dtype)
        copy_all(self._unpacked(self.packed, self.grid.copy), [shards[k] for k in self.of_row[self.grid.copy]])
        self.sent = self.packed[: sum(self.to_owner)]
        if self.grid.shards > 1:
            self.received = self.packed.new_empty(sum(self.from_shard))
            self.work = self._all_to_all(self.received, self.from_shard, self.sent, self.to_owner)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Wait for the batch that this process owns, work on it, and start to bring the results back."""
        if self.grid.shards == 1:
            if self.own:
                self.sent.copy_(function(self.sent.view(self._batch_shape())).flatten())
            self._share()
            return
        self.work.wait()
        if self.own:
            batch = self.packed.new_empty(self._batch_shape())
            copy_all(self._places_in(batch), self._pieces())
            copy_all(self._pieces(), self._places_in(function(batch)))
        self.work = self._all_to_all(self.sent, self.to_owner, self.received, self.from_shard)

    def share(self) -> None:
        """Wait for the results of this row's owners and start to pass them on to the other rows."""
        if self.grid.shards > 1:
            self.work.wait()
            self._share()

    def take(self) -> dict[int, Tensor]:
        """Wait for the results of all rows; this process's shard of each, by the matrix's number."""
        if self.grid.copies > 1:
            self.work.wait()
        results = {}
        for copy, row in enumerate(self.results.view(self.grid.copies, self.width)):
            results |= zip(self.of_row[copy], self._unpacked(row, copy), strict=True)
        self.packed = self.sent = self.received = self.results = self.work = None
        return results

    def _share(self) -> None:
        self.results = self.packed
        if self.grid.copies > 1:
            self.results = self.packed.new_empty(self.grid.copies * self.width)
            self.work = all_gather(self.results, self.packed, self.grid.column, async_op=True)

    def _all_to_all(self, target: Tensor, received: list[int], source: Tensor, sent: list[int]) -> dist.Work:
        return dist.all_to_all_single(target, source, received, sent, self.grid.row, async_op=True)

    def _numel(self, k: int, shard: int) -> int:
        return self.matrices[k].shard_shape(self.grid.shards, shard).numel()

    def _batch_shape(self) -> tuple[int, ...]:
        return (len(self.own), *self.matrices[self.own[0]].shape)

    def _unpacked(self, packed: Tensor, copy: int) -> list[Tensor]:
        """Views of this column's shards of the matrices of a row."""
        return cut(packed, [self.matrices[k].shard_shape(self.grid.shards, self.grid.shard) for k in self.of_row[copy]])

    def _pieces(self) -> list[Tensor]:
        """Views of `received`: shard 0 of each own matrix, then shard 1, and so on."""
        shards = range(self.grid.shards)
        return cut(self.received, [self.matrices[k].shard_shape(len(shards), j) for j in shards for k in self.own])

    def _places_in(self, batch: Tensor) -> list[Tensor]:
        """Views of a batch [n, rows, columns] in the order of `_pieces`."""
        return [
            whole.narrow(self.matrices[k].dim, *self.matrices[k].extent(self.grid.shards, shard))
            for shard in range(self.grid.shards)
            for k, whole in zip(self.own, batch, strict=True)
        ]


def cut(packed: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views of the given shapes, one after another, of the start of a vector."""
    sizes = [shape.numel() for shape in shapes]
    parts = packed[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:  # foreach functions refuse empty lists
        torch._foreach_copy_(targets, sources)


class Exchange:
    """Applies a function to whole matrices that are spread over a grid.

    Args:
        matrices: their shapes and how they are cut, the same on all processes.
        costs: what the function costs on each, in any unit.
        grid: how they are spread.
    """

    def __init__(self, matrices: Sequence[Matrix], costs: Sequence[int], grid: Grid):
        shapes = [matrix.shape for matrix in matrices]
        self.owners = choose_owners(shapes, costs, grid.processes)
        buckets = batches_by_owner(shapes, self.owners, grid.processes)
        self.buckets = [Bucket(matrices, batches, grid) for batches in buckets]

    def apply(self, function: Callable[[Tensor], Tensor], shards: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """function, of batches [n, rows, columns] in dtype, on all matrices.

        Args:
            shards: what this process holds of each matrix, in any precision.

        Returns:
            What it holds of each result, in dtype.
        """
        for bucket in self.buckets:
            bucket.gather(shards, dtype)
        for bucket in self.buckets:
            bucket.apply(function)
        for bucket in self.buckets:
            bucket.share()
        results = {}
        for bucket in self.buckets:
            results |= bucket.take()
        return [results[k] for k in range(len(shards))]
