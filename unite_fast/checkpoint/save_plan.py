"""Which rank writes which shards of a checkpoint: a function of shapes and mesh alone, so no rank has to ask another.

The training state is on an R x S mesh: R replicas, each sharded over S ranks; rank r S + s holds shard s of replica r.
There are at most `MOST_FILES` files, spread over the ranks:

- S <= MOST_FILES: n = min(R, MOST_FILES // S) replicas write, and each of their ranks writes a file. A tensor is
  written by one replica; the tensors are divided so that all write about as many bytes.
- S > MOST_FILES: one replica writes. Of ceil(S / MOST_FILES) neighbouring ranks the first writes, and the others send
  it their shards. Writing into the file themselves would need no memory for it, but NFS keeps a file consistent only
  from close to open (https://nfs.sourceforge.net/#faq_a8).
"""

from dataclasses import dataclass
from itertools import pairwise
from math import prod

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

MOST_FILES = 64
"""Files of a checkpoint. Each is created, synced, listed and read again: with one for each of 512 ranks that is the
work, as a file has a few MB. A single file would be as slow as one process writes."""


@dataclass(frozen=True)
class Layout:
    """How a tensor lies on the mesh."""

    shape: tuple[int, ...]
    """of the whole tensor"""
    item_bytes: int
    dim: int | None
    """Dimension that is divided over the S ranks, like `torch.chunk`; None: whole on every rank."""

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.item_bytes

    def start(self, shard: int, shards: int) -> int:
        """Where a shard begins in dimension `dim`; `shard` = `shards` gives the end."""
        assert self.dim is not None
        length = self.shape[self.dim]
        return min(shard * -(-length // shards), length)


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: a whole one, or neighbouring shards of one."""

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dim: int
    sizes: tuple[int, ...]
    """Extent in `dim` of what each of the file's ranks holds of it; 0: nothing."""

    @property
    def divided(self) -> bool:
        """Whether other ranks than the first hold some of it."""
        return any(self.sizes[1:])


@dataclass(frozen=True)
class SavePlan:
    """The file to which a rank contributes."""

    ranks: tuple[int, ...]
    """Its ranks; the first writes it, the others send their shards to it."""
    entries: tuple[Entry, ...]
    """Its content; empty: no file."""

    def staged(self, rank: int) -> list[str]:
        """Tensors of which this rank contributes its shard."""
        index = self.ranks.index(rank)
        return [entry.name for entry in self.entries if entry.sizes[index] or not index]


def plan_save(layouts: dict[str, Layout], mesh: tuple[int, int], rank: int) -> SavePlan:
    """The plan of one rank. Every shard is in one file, those of no elements in any number."""
    replicas, shards = mesh
    replica, shard = divmod(rank, shards)
    writing = min(replicas, max(1, MOST_FILES // shards))
    # Replica i of those that write, evenly spread over all, so over the machines.
    writers = [i * replicas // writing for i in range(writing)]
    per_file = -(-shards // MOST_FILES)
    first = shard - shard % per_file
    ends = range(first, min(first + per_file, shards) + 1)
    ranks = tuple(replica * shards + index for index in ends[:-1])
    if replica not in writers:
        return SavePlan(ranks, ())
    owners = divide(layouts, writing)
    entries = []
    for name, layout in layouts.items():
        if writers[owners[name]] != replica:
            continue
        offsets, shape = [0] * len(layout.shape), list(layout.shape)
        if layout.dim is None:
            if first:
                continue
            dim, sizes = 0, [*shape[:1], 1][:1] + [0] * (len(ranks) - 1)  # the writer has all of it
        else:
            dim = layout.dim
            starts = [layout.start(index, shards) for index in ends]
            sizes = [end - start for start, end in pairwise(starts)]
            if first and not sum(sizes):
                continue
            offsets[dim], shape[dim] = starts[0], sum(sizes)
        entries.append(Entry(name, tuple(offsets), tuple(shape), dim, tuple(sizes)))
    return SavePlan(ranks, tuple(entries))


def divide(layouts: dict[str, Layout], parts: int) -> dict[str, int]:
    """Divide tensors into parts of about the same bytes: the largest first, each to the part that has least."""
    filled = [0] * parts
    owners = {}
    for name in sorted(layouts, key=lambda name: (-layouts[name].bytes, name)):
        owners[name] = min(range(parts), key=filled.__getitem__)
        filled[owners[name]] += layouts[name].bytes
    return owners


def mesh_of(tensors: dict[str, Tensor], world: int) -> tuple[int, int]:
    """(R, S) of the mesh on which these tensors lie; (world, 1) if none is a DTensor."""
    meshes = {tensor.device_mesh for tensor in tensors.values() if isinstance(tensor, DTensor)}
    if not meshes:
        return world, 1
    assert len(meshes) == 1, "the training state has one mesh"
    (mesh,) = meshes
    assert mesh.ndim == 2 and mesh.mesh.flatten().tolist() == list(range(world)), mesh
    return mesh.size(0), mesh.size(1)


def layout_of(tensor: Tensor) -> Layout:
    dim = None
    if isinstance(tensor, DTensor):
        dims = [placement.dim for placement in tensor.placements if isinstance(placement, Shard)]
        assert len(dims) <= 1, tensor.placements
        dim = dims[0] if dims else None
    return Layout(tuple(tensor.shape), tensor.element_size(), dim)
