"""The same code for sharded tensors (DTensor) and plain ones."""

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if it is a DTensor: then all ranks call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_full(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor, which every rank has, into a plain tensor or a DTensor. Nothing is communicated."""
    if isinstance(target, DTensor):
        source = source.to(target.device)
        source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
    local(target).copy_(local(source))


def shard_group(tensor: Tensor) -> ProcessGroup | None:
    """The ranks over which a tensor is sharded; None if this rank holds all of it."""
    if isinstance(tensor, DTensor):
        for dim, placement in enumerate(tensor.placements):
            if placement.is_shard() and tensor.device_mesh.size(dim) > 1:
                return tensor.device_mesh.get_group(dim)
    return None
