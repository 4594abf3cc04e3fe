"""Tensors of which each process holds a part (DTensor), next to plain ones."""

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory; a plain tensor is held whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor; where it is sharded, a copy that all processes must ask for together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_whole(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor, which every process has, into one of which this process may hold a part. Nothing is sent."""
    if isinstance(target, DTensor):
        source = source.to(target.device)
        source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
    local(target).copy_(local(source))


def shard_group(tensor: Tensor) -> ProcessGroup | None:
    """The processes among which a tensor is divided; None if this one holds all of it."""
    if isinstance(tensor, DTensor):
        for dim, placement in enumerate(tensor.placements):
            if placement.is_shard() and tensor.device_mesh.size(dim) > 1:
                return tensor.device_mesh.get_group(dim)
    return None
