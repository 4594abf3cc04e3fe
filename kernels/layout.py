"""How the fast bodies take and give tensors: element types, dense rows, room for results."""

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""The element types of the fused ops, numbered as in csrc/element.h."""


def dense(x: Tensor) -> Tensor:
    """x, or a copy of it if its last dimension is strided. Hold on to it for as long as its address is in use."""
    return x if x.stride(-1) == 1 else x.contiguous()


def floats(x: Tensor | None) -> Tensor | None:
    """A weight or table as dense float32."""
    return None if x is None else x.float().contiguous()


def typed(x: Tensor) -> Tensor:
    """Dense as `dense`, in float32 unless its type is one of `TYPES`."""
    return dense(x if x.dtype in TYPES else x.float())


def gradient(incoming: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An incoming gradient, dense as `dense`. One that nobody sent is None: zeros of `like`'s type, which take the room
    of one row."""
    if incoming is None:
        return like.new_zeros(shape[-1]).expand(shape)
    return dense(incoming)


def room(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room for a dense tensor of the same shape, in `dtype` or its own."""
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def room_typed(like: Tensor) -> Tensor:
    """Room for the gradient of what a body reads by way of `typed`."""
    return room(like, None if like.dtype in TYPES else torch.float32)


def room_floats(like: Tensor | None, beside: Tensor) -> Tensor:
    """Room for the gradient of a weight; of no size for a weight that is None."""
    return beside.new_empty(0, dtype=torch.float32) if like is None else room(like, torch.float32)


def in_units(strides: Sequence[int]) -> tuple[int, list[int]]:
    """A unit of up to 8 elements, and strides counted in it, for a Triton kernel. 8 of bfloat16 are one access of 16
    bytes; of a stride of 72, Triton by itself sees no more than that it is not a multiple of 16."""
    unit = gcd(8, *strides)
    return unit, [stride // unit for stride in strides]
