"""Tensors of which each process holds a part (DTensor), next to plain ones."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory; a plain tensor is held whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
