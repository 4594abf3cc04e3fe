"""Work on whole matrices, of which each process holds a shard or a copy, done once and split over all processes.

The processes form a grid of R copies by S shards, as `fully_shard` on a two-dimensional mesh makes it: every matrix is
cut into S shards along one dimension, as torch.chunk cuts, and the processes of one column hold the same shard. Each
matrix has one owner on the grid. It works on whole matrices, batched by shape; the others only send and receive:

    gather      within the owner's row, every process sends the owner its shard   (all-to-all; nothing if S = 1)
    work        the owner's function, on a batch of matrices of one shape
    give back   the reverse of gather                                             (all-to-all; nothing if S = 1)
    share       within a column, each row passes on what its owners made          (all-gather; nothing if R = 1)

A bucket holds one batch of each owner and travels at once. All gathers start together; while a bucket is worked on,
later ones still come and earlier ones go back (or, where S = 1, are shared).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


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
        across, within = p.placements
        if not isinstance(across, Replicate) or type(within) is not Shard:
            raise ValueError(f"a matrix is placed as {p.placements}; make it (Replicate(), Shard(dim))")
    (mesh,) = meshes
    grid = Grid(*mesh.shape, *mesh.get_coordinate(), row=mesh.get_group(1), column=mesh.get_group(0))
    return grid, [Matrix(p.shape, p.placements[1].dim) for p in parameters]


SLACK = 1.01
"""What batches may cost in balance. One per cent leaves B on 8 processes 19 batches of one shape instead of 60."""


def choose_owners(shapes: Sequence[torch.Size], costs: Sequence[int], processes: int) -> list[int]:
    """The process 0 .. processes - 1 that owns each matrix.

    Greedy by longest processing time (Graham, 1969): the dearest first, each to the process with the least to do. Then
    again, with matrices of one shape kept together as far as they fit below the load that the first time ended with.
    Depends on the arguments alone, so that all processes choose the same.
    """
    owners, worst = _greedy(shapes, costs, processes, limit=0)
    together, load = _greedy(shapes, costs, processes, limit=SLACK * worst)
    return together if load <= SLACK * worst else owners


def _greedy(shapes: Sequence[torch.Size], costs: Sequence[int], processes: int, limit: float) -> tuple[list[int], int]:
    """Owners, and the largest load; one that has a shape gets more of it while that keeps its load within the limit."""
    loads, held, owners = [0] * processes, [set() for _ in range(processes)], [0] * len(shapes)
    for k in sorted(range(len(shapes)), key=lambda k: (-costs[k], shapes[k], k)):
        have = [i for i in range(processes) if shapes[k] in held[i] and loads[i] + costs[k] <= limit]
        owners[k] = owner = min(have or range(processes), key=lambda i: loads[i])
        loads[owner] += costs[k]
        held[owner].add(shapes[k])
    return owners, max(loads)


def batches_by_owner(shapes: Sequence[torch.Size], owners: Sequence[int], processes: int) -> list[list[list[int]]]:
    """For each bucket, for each process, the matrices of its batch: all it owns of one shape, or none."""
    batches = [defaultdict(list) for _ in range(processes)]
    for k, owner in enumerate(owners):
        batches[owner][shapes[k]].append(k)
    # Large batches first: their way back is hidden behind the smaller ones.
    ordered = [sorted(own.values(), key=lambda batch: -len(batch) * shapes[batch[0]].numel()) for own in batches]
    return [[own[i] if i < len(own) else [] for own in ordered] for i in range(max(len(own) for own in ordered))]


class Bucket:
    """One batch of each owner: which part of it each process of this row holds, and its way there and back in a step.

    Attributes:
        own: the matrices of the batch that this process owns, by number; maybe none.
        of_row: for each row, the matrices of its owners' batches, in the order in which shards of them are packed.
        sizes: for each row, how many elements of those this column holds.
    """

    def __init__(self, matrices: Sequence[Matrix], batches: Sequence[list[int]], grid: Grid):
        self.grid = grid
        self.own = batches[grid.place]
        rows = [batches[copy * grid.shards : (copy + 1) * grid.shards] for copy in range(grid.copies)]
        self.of_row = [[k for batch in row for k in batch] for row in rows]

        here = [matrix.shard_shape(grid.shards, grid.shard) for matrix in matrices]
        self.shapes = [[here[k] for k in row] for row in self.of_row]
        self.sizes = [sum(shape.numel() for shape in row) for row in self.shapes]
        self.to_owner = [sum(here[k].numel() for k in batch) for batch in rows[grid.copy]]

        shards = range(grid.shards)
        self.pieces = [matrices[k].shard_shape(grid.shards, shard) for shard in shards for k in self.own]
        """Of what comes to this owner: shard 0 of each matrix, then shard 1, and so on."""
        self.places = [
            (i, matrices[k].dim, *matrices[k].extent(grid.shards, shard))
            for shard in shards
            for i, k in enumerate(self.own)
        ]
        """Where each piece belongs in the batch: matrix, dimension, start and length along it."""
        self.from_shard = [
            sum(piece.numel() for piece in self.pieces[shard * len(self.own) : (shard + 1) * len(self.own)])
            for shard in shards
        ]
        self.batch_shape = (len(self.own), *matrices[self.own[0]].shape) if self.own else None

    def elements_sent(self) -> int:
        there, back = sum(self.to_owner), sum(self.from_shard)
        return there - self.to_owner[self.grid.shard] + back - self.from_shard[self.grid.shard]

    def gather(self, shards: Mapping[int, Tensor], packed: Tensor) -> None:
        """Start to bring this process's shards to the owners of its row, packed and cast into `packed`."""
        self.packed = packed
        copy_all(self.unpack(packed, self.grid.copy), [shards[k] for k in self.of_row[self.grid.copy]])
        if self.grid.shards > 1:
            self.received = packed.new_empty(sum(self.from_shard))
            self.work = self._all_to_all(self.received, self.from_shard, packed, self.to_owner)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Wait for the batch that this process owns, work on it, and start to bring the results back to `packed`."""
        if self.grid.shards == 1:
            if self.own:
                self.packed.copy_(function(self.packed.view(self.batch_shape)).flatten())
            return
        self.work.wait()
        if self.own:
            pieces, batch = cut(self.received, self.pieces), self.packed.new_empty(self.batch_shape)
            copy_all(self._places_in(batch), pieces)
            copy_all(pieces, self._places_in(function(batch)))
        self.work = self._all_to_all(self.packed, self.to_owner, self.received, self.from_shard)

    def arrive(self) -> None:
        """Wait for the results of this row's owners, and let the buffers go."""
        if self.grid.shards > 1:
            self.work.wait()
        self.packed = self.received = self.work = None

    def unpack(self, packed: Tensor, copy: int) -> list[Tensor]:
        """Views of this column's shards of a row's matrices."""
        return cut(packed, self.shapes[copy])

    def _all_to_all(self, target: Tensor, received: list[int], source: Tensor, sent: list[int]) -> dist.Work:
        return dist.all_to_all_single(target, source, received, sent, self.grid.row, async_op=True)

    def _places_in(self, batch: Tensor) -> list[Tensor]:
        return [batch[i].narrow(dim, start, length) for i, dim, start, length in self.places]


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

    Attributes:
        owners: the process of each matrix, counted row by row.
        supplied: the matrices, by number, of which this process's shard is asked for: those that its row owns.
    """

    def __init__(self, matrices: Sequence[Matrix], costs: Sequence[int], grid: Grid):
        self.grid = grid
        shapes = [matrix.shape for matrix in matrices]
        self.owners = choose_owners(shapes, costs, grid.processes)
        buckets = batches_by_owner(shapes, self.owners, grid.processes)
        self.buckets = [Bucket(matrices, batches, grid) for batches in buckets]
        self.supplied = [k for bucket in self.buckets for k in bucket.of_row[grid.copy]]
        # A row's results lie one after another. gloo has no all-gather of unequal parts, and NCCL makes R broadcasts of
        # one. So what is shared after a bucket is as much as every row has by then, and only the end is padded.
        ends = [list(accumulate(sizes)) for sizes in zip(*(bucket.sizes for bucket in self.buckets), strict=True)]
        ready = [min(end) for end in zip(*ends, strict=True)]
        self.width = max(end[-1] for end in ends)
        self.shared = list(pairwise([0, *ready[:-1], self.width]))

    def elements_sent(self) -> int:
        """What this process sends to others when `apply` runs once; an all-gather sends as a ring's would."""
        return sum(bucket.elements_sent() for bucket in self.buckets) + (self.grid.copies - 1) * self.width

    def apply(
        self,
        function: Callable[[Tensor], Tensor],
        shards: Mapping[int, Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[Tensor]:
        """function, of batches [n, rows, columns] in dtype, on all matrices.

        Args:
            shards: what this process holds of the matrices `supplied`, in any precision, on device.

        Returns:
            What it holds of the result of each matrix, in dtype.
        """
        packed = torch.empty(self.width, dtype=dtype, device=device)
        sizes = [bucket.sizes[self.grid.copy] for bucket in self.buckets]
        for bucket, part in zip(self.buckets, packed[: sum(sizes)].split(sizes), strict=True):
            bucket.gather(shards, part)
        rows = packed[None] if self.grid.copies == 1 else packed.new_empty(self.grid.copies, self.width)
        sharing = []
        for i, bucket in enumerate(self.buckets):
            bucket.apply(function)
            if self.grid.shards == 1:  # nothing has to come back before it can be shared
                sharing += self._share(i, packed, rows)
        if self.grid.shards > 1:
            for i in range(len(self.buckets)):
                sharing += self._share(i, packed, rows)
        for work in sharing:
            work.wait()
        return self._unpack(rows)

    def _share(self, i: int, packed: Tensor, rows: Tensor) -> list[dist.Work]:
        """Wait for this row's results of bucket i, then start to pass on to the other rows what all have by then."""
        self.buckets[i].arrive()
        start, end = self.shared[i]
        if self.grid.copies == 1 or start == end:
            return []
        return [dist.all_gather(list(rows[:, start:end]), packed[start:end], self.grid.column, async_op=True)]

    def _unpack(self, rows: Tensor) -> list[Tensor]:
        results = {}
        for copy, row in enumerate(rows):
            for bucket in self.buckets:
                results |= zip(bucket.of_row[copy], bucket.unpack(row, copy), strict=True)
                row = row[bucket.sizes[copy] :]
        return [results[k] for k in range(len(results))]
