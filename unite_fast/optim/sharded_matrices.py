"""Apply a function to whole matrices that are sharded over ranks: each matrix on one rank, its owner.

The ranks form a grid of R replicas (rows) by S shards (columns), the mesh of `fully_shard`. Every matrix is cut into S
shards along one dimension, as torch.chunk cuts. All ranks in a column hold the same shard.

    R = 2, S = 3; a matrix W whose owner is the rank in row 0, column 1:

               column 0        column 1        column 2
    row 0      W[0] ---------> W <--------- W[2]           1. gather    all-to-all in the row      (S > 1)
                               f(W)                        2. compute   on the owner alone
               f(W)[0] <------ f(W) ------> f(W)[2]        3. scatter   all-to-all in the row      (S > 1)
                  |            f(W)[1]      |
                  v               v         v              4. share     all-gather in each column  (R > 1)
    row 1      f(W)[0]         f(W)[1]      f(W)[2]

Owners batch their matrices by shape. A bucket holds one batch per owner, and its shards travel in one collective. All
gathers start at once, so the owners compute on one bucket while later buckets arrive and earlier ones are scattered
(or, if S = 1, shared).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True)
class Grid:
    """R x S ranks, and the position of this rank: row `replica`, column `shard`."""

    replicas: int = 1
    shards: int = 1
    replica: int = 0
    shard: int = 0
    row: dist.ProcessGroup | None = None
    """Ranks of this row; together they hold each matrix once."""
    column: dist.ProcessGroup | None = None
    """Ranks of this column; each holds the same shards."""

    @property
    def size(self) -> int:
        return self.replicas * self.shards

    @property
    def rank(self) -> int:
        """Rank in the grid, counted row by row."""
        return self.replica * self.shards + self.shard


@dataclass(frozen=True)
class Matrix:
    """Shape of a whole matrix and the dimension along which it is sharded."""

    shape: torch.Size
    dim: int = 0

    def shard_range(self, shards: int, shard: int) -> tuple[int, int]:
        """Start and length of a shard along `dim`. As with torch.chunk, the last shards may be shorter or empty."""
        length = self.shape[self.dim]
        chunk = -(-length // shards)
        start = min(shard * chunk, length)
        return start, min(chunk, length - start)

    def shard_shape(self, shards: int, shard: int) -> torch.Size:
        shape = list(self.shape)
        shape[self.dim] = self.shard_range(shards, shard)[1]
        return torch.Size(shape)


def layout(parameters: Sequence[Tensor]) -> tuple[Grid, list[Matrix]]:
    """Grid and shapes of plain tensors (one process) or of DTensors on one (replicas, shards) mesh.

    Raises:
        ValueError: another mesh or placement, or a mixture of plain tensors and DTensors.
    """
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    if not sharded:
        return Grid(), [Matrix(p.shape) for p in parameters]
    mesh = sharded[0].device_mesh
    if len(sharded) < len(parameters) or mesh.ndim != 2 or any(p.device_mesh != mesh for p in sharded):
        raise ValueError("give all matrices as plain tensors, or all as DTensors on one mesh of two dimensions")
    matrices = []
    for p in sharded:
        across, within = p.placements
        if not isinstance(across, Replicate) or type(within) is not Shard:
            raise ValueError(f"a matrix is placed as {p.placements}; make it (Replicate(), Shard(dim))")
        matrices.append(Matrix(p.shape, within.dim))
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # None only on ranks outside the mesh, and these hold no parameters
    replicas, shards = mesh.shape
    replica, shard = coordinate
    return Grid(replicas, shards, replica, shard, row=mesh.get_group(1), column=mesh.get_group(0)), matrices


SLACK = 1.01
"""Imbalance of load allowed for the sake of larger batches. One per cent leaves model B on 8 ranks with 19 batches
instead of 60."""


def choose_owners(shapes: Sequence[torch.Size], costs: Sequence[int], size: int) -> list[int]:
    """The owner of each matrix, a rank 0 .. size - 1 in the grid.

    Greedy, longest processing time first (Graham, 1969): each matrix, in order of falling cost, goes to the rank with
    the least load. A second pass prefers ranks that already own a matrix of the same shape, as long as their load stays
    within SLACK of the first pass's maximum. The result depends on the arguments alone, so all ranks choose the same.
    """
    owners, max_load = _assign(shapes, costs, size, limit=0)
    grouped, grouped_load = _assign(shapes, costs, size, limit=SLACK * max_load)
    return grouped if grouped_load <= SLACK * max_load else owners


def _assign(shapes: Sequence[torch.Size], costs: Sequence[int], size: int, limit: float) -> tuple[list[int], int]:
    """Owners and the largest load. Ranks that own a matrix of the same shape come first while within `limit`."""
    loads, owned_shapes, owners = [0] * size, [set() for _ in range(size)], [0] * len(shapes)
    for k in sorted(range(len(shapes)), key=lambda k: (-costs[k], shapes[k], k)):
        same_shape = [r for r in range(size) if shapes[k] in owned_shapes[r] and loads[r] + costs[k] <= limit]
        owners[k] = owner = min(same_shape or range(size), key=lambda r: loads[r])
        loads[owner] += costs[k]
        owned_shapes[owner].add(shapes[k])
    return owners, max(loads)


def batches_by_owner(shapes: Sequence[torch.Size], owners: Sequence[int], size: int) -> list[list[list[int]]]:
    """Matrix indices as [bucket][owner][matrix]: each batch has one shape, and may be empty."""
    by_shape = [defaultdict(list) for _ in range(size)]
    for k, owner in enumerate(owners):
        by_shape[owner][shapes[k]].append(k)
    # Large batches first, so that their scatter overlaps with computing on the smaller ones.
    ordered = [sorted(own.values(), key=lambda batch: -len(batch) * shapes[batch[0]].numel()) for own in by_shape]
    return [[own[i] if i < len(own) else [] for own in ordered] for i in range(max(len(own) for own in ordered))]


class Bucket:
    """One batch per owner: which shards of it each rank in this row holds, and the all-to-alls that gather them and
    scatter the result. `packed` is this rank's side of both: its shards of the row's matrices, owner by owner.

    Attributes:
        owned: matrices in this rank's batch, by index; may be empty.
        by_row: for each row, the matrices of its owners' batches, in the order of `packed`.
        row_sizes: for each row, the elements of `packed`.
    """

    packed: Tensor
    received: Tensor
    work: dist.Work

    def __init__(self, matrices: Sequence[Matrix], batches: Sequence[list[int]], grid: Grid):
        self.grid = grid
        self.owned = batches[grid.rank]
        rows = [batches[row * grid.shards : (row + 1) * grid.shards] for row in range(grid.replicas)]
        self.by_row = [[k for batch in row for k in batch] for row in rows]

        local_shapes = [matrix.shard_shape(grid.shards, grid.shard) for matrix in matrices]
        self.shard_shapes = [[local_shapes[k] for k in row] for row in self.by_row]
        self.row_sizes = [sum(shape.numel() for shape in row) for row in self.shard_shapes]
        self.send_sizes = [sum(local_shapes[k].numel() for k in batch) for batch in rows[grid.replica]]
        """Elements that this rank sends to each owner of its row."""

        shards = range(grid.shards)
        self.piece_shapes = [matrices[k].shard_shape(grid.shards, shard) for shard in shards for k in self.owned]
        """Shapes of what this owner receives: shard 0 of each owned matrix, then shard 1, and so on."""
        self.piece_slots = [
            (i, matrices[k].dim, *matrices[k].shard_range(grid.shards, shard))
            for shard in shards
            for i, k in enumerate(self.owned)
        ]
        """Where each piece goes in the batch: index of the matrix, dimension, start and length along it."""
        count = len(self.owned)
        self.receive_sizes = [
            sum(shape.numel() for shape in self.piece_shapes[shard * count : (shard + 1) * count]) for shard in shards
        ]
        """Elements that this owner receives from each rank of its row."""
        self.batch_shape = (count, *matrices[self.owned[0]].shape) if self.owned else (0,)

    def elements_sent(self) -> int:
        """Elements that this rank sends to others in gather and scatter."""
        gather, scatter, own = sum(self.send_sizes), sum(self.receive_sizes), self.grid.shard
        return gather - self.send_sizes[own] + scatter - self.receive_sizes[own]

    def start_gather(self, packed: Tensor) -> None:
        """Start to send this rank's shards, which `packed` holds, to the owners in this row."""
        self.packed = packed
        if self.grid.shards > 1:
            self.received = packed.new_empty(sum(self.receive_sizes))
            self.work = self._all_to_all(self.received, self.receive_sizes, packed, self.send_sizes)

    def compute(self, function: Callable[[Tensor], Tensor]) -> None:
        """Wait for this rank's batch, apply `function` to it, and start to scatter the result into `packed`."""
        if self.grid.shards == 1:
            if self.owned:
                batch = self.packed.view(self.batch_shape)
                batch.copy_(function(batch))
            return
        self.work.wait()
        if self.owned:
            pieces, batch = views(self.received, self.piece_shapes), self.packed.new_empty(self.batch_shape)
            foreach_copy(self._slots(batch), pieces)
            foreach_copy(pieces, self._slots(function(batch)))
        self.work = self._all_to_all(self.packed, self.send_sizes, self.received, self.receive_sizes)

    def finish(self) -> None:
        """Wait until `packed` holds the results of this row's owners, and release the buffers."""
        if self.grid.shards > 1:
            self.work.wait()
            del self.received, self.work
        del self.packed

    def shard_views(self, packed: Tensor, row: int) -> list[Tensor]:
        """Views of this column's shards of the row's matrices."""
        return views(packed, self.shard_shapes[row])

    def _all_to_all(self, output: Tensor, output_sizes: list[int], input: Tensor, input_sizes: list[int]) -> dist.Work:
        return started(dist.all_to_all_single(output, input, output_sizes, input_sizes, self.grid.row, async_op=True))

    def _slots(self, batch: Tensor) -> list[Tensor]:
        return [batch[i].narrow(dim, start, length) for i, dim, start, length in self.piece_slots]


def views(packed: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views of the given shapes, one after another, from the start of a vector."""
    sizes = [shape.numel() for shape in shapes]
    parts = packed[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def foreach_copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:  # foreach functions refuse empty lists
        torch._foreach_copy_(targets, sources)


def started(work: dist.Work | None) -> dist.Work:
    assert work is not None  # torch returns None only on ranks outside the group
    return work


class ShardedMap:
    """Applies a function to whole matrices that are sharded over a grid of ranks.

    Args:
        matrices: shapes and shard dimensions, the same on all ranks.
        costs: cost of the function on each matrix, in any unit.
        grid: the ranks.

    Attributes:
        owners: rank in the grid that computes each matrix.
        inputs: indices of the matrices owned in this row; `apply` needs this rank's shards of these.
    """

    def __init__(self, matrices: Sequence[Matrix], costs: Sequence[int], grid: Grid):
        self.grid = grid
        shapes = [matrix.shape for matrix in matrices]
        self.owners = choose_owners(shapes, costs, grid.size)
        buckets = batches_by_owner(shapes, self.owners, grid.size)
        self.buckets = [Bucket(matrices, batches, grid) for batches in buckets]
        self.inputs = [k for bucket in self.buckets for k in bucket.by_row[grid.replica]]
        # Rows own different numbers of elements, but gloo has no all-gather of unequal parts, and NCCL's is R
        # broadcasts. So the all-gather after a bucket covers what every row has finished by then; the last one covers
        # the rest, padded to the largest row.
        ends = [list(accumulate(sizes)) for sizes in zip(*(bucket.row_sizes for bucket in self.buckets), strict=True)]
        finished = [min(end) for end in zip(*ends, strict=True)]
        self.row_size = max(end[-1] for end in ends)
        self.all_gather_ranges = list(pairwise([0, *finished[:-1], self.row_size]))

    def elements_sent(self) -> int:
        """Elements that this rank sends to others in one `apply`; an all-gather is counted as a ring."""
        return sum(bucket.elements_sent() for bucket in self.buckets) + (self.grid.replicas - 1) * self.row_size

    def apply(
        self,
        function: Callable[[Tensor], Tensor],
        write: Callable[[dict[int, Tensor]], None],
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[Tensor]:
        """Apply `function` to all matrices. All ranks call this together.

        Args:
            function: maps a batch [n, rows, columns] of `dtype` to one of the same shape.
            write: writes this rank's shards of the matrices in `inputs` into the tensors that it gets, by index; they
                have `dtype` and are on `device`.

        Returns:
            This rank's shards of all results, in `dtype`.
        """
        packed = torch.empty(self.row_size, dtype=dtype, device=device)
        sizes = [bucket.row_sizes[self.grid.replica] for bucket in self.buckets]
        parts = packed[: sum(sizes)].split(sizes)
        shards = {}
        for bucket, part in zip(self.buckets, parts, strict=True):
            shards |= zip(bucket.by_row[self.grid.replica], bucket.shard_views(part, self.grid.replica), strict=True)
        write(shards)
        for bucket, part in zip(self.buckets, parts, strict=True):
            bucket.start_gather(part)
        rows = packed[None] if self.grid.replicas == 1 else packed.new_empty(self.grid.replicas, self.row_size)
        all_gathers = []
        for i, bucket in enumerate(self.buckets):
            bucket.compute(function)
            if self.grid.shards == 1:  # nothing is scattered, so the result can be shared at once
                all_gathers += self._finish_and_share(i, packed, rows)
        if self.grid.shards > 1:
            for i in range(len(self.buckets)):
                all_gathers += self._finish_and_share(i, packed, rows)
        for work in all_gathers:
            work.wait()
        return self._results(rows)

    def _finish_and_share(self, i: int, packed: Tensor, rows: Tensor) -> list[dist.Work]:
        """Wait for bucket i's results, then start the all-gather of what all rows have finished."""
        self.buckets[i].finish()
        start, end = self.all_gather_ranges[i]
        if self.grid.replicas == 1 or start == end:
            return []
        outputs = list(rows[:, start:end])
        return [started(dist.all_gather(outputs, packed[start:end], self.grid.column, async_op=True))]

    def _results(self, rows: Tensor) -> list[Tensor]:
        results = {}
        for i, row in enumerate(rows):
            for bucket in self.buckets:
                results |= zip(bucket.by_row[i], bucket.shard_views(row, i), strict=True)
                row = row[bucket.row_sizes[i] :]
        return [results[k] for k in range(len(results))]
