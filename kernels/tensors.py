"""What the ops share: their arithmetic in plain PyTorch, and how the fast backends read and allocate tensors."""

from collections.abc import Sequence
from math import gcd
from typing import overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-6
"""Epsilon of RMSNorms that are recomputed in backward; forward and backward must agree."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes that the fast backends read and write, numbered as `Type` in csrc/element.h."""


def upcast(x: Tensor) -> Tensor:
    """x in float32; unchanged if it is float32 or float64 (the reference precision of the tests)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich, arXiv 1910.07467), in float32 or better."""
    x = upcast(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * upcast(weight)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with x [B, T, D] and one shift and scale per sample, [B, D]."""
    return x * (1 + upcast(scale).unsqueeze(1)) + upcast(shift).unsqueeze(1)


class _Containing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.dtype = bias.dtype
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_x):
        return d_x, upcast(d_x).flatten(0, -2).sum(0).to(ctx.dtype)


def containing(x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., N], which contains a bias [N] already: the bias gets the sum of x's gradient. x itself for None."""
    return x if bias is None else _Containing.apply(x, bias)


def check_contained(op: str, name: str, x: Tensor, bias: Tensor | None) -> None:
    """The check of a bias that x contains."""
    if bias is not None and bias.shape != x.shape[-1:]:
        raise argument_error(op, f"{name} must be [{x.shape[-1]}], got {list(bias.shape)}")


def argument_error(op: str, message: str) -> ValueError:
    """The error for an argument that an op cannot take. Call it only after the check failed: formatting a message costs
    as much as a small op."""
    return ValueError(f"{op}: {message}")


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype to which a Linear casts x. An op that writes it directly saves a pass over memory."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def dense(x: Tensor) -> Tensor:
    """x, or a contiguous copy if its last dimension is strided. Keep a reference while its address is in use."""
    return x if x.stride(-1) == 1 else x.contiguous()


@overload
def as_float32(x: Tensor) -> Tensor: ...
@overload
def as_float32(x: None) -> None: ...
def as_float32(x: Tensor | None) -> Tensor | None:
    """A weight or table in contiguous float32."""
    return None if x is None else x.float().contiguous()


def as_supported(x: Tensor) -> Tensor:
    """x in one of `DTYPES` (float32 if it has another), with a dense last dimension."""
    return dense(x if x.dtype in DTYPES else x.float())


@overload
def as_input(x: Tensor) -> Tensor: ...
@overload
def as_input(x: None) -> None: ...
def as_input(x: Tensor | None) -> Tensor | None:
    """x as the fast backends read an input: a weight [D] `as_float32`, all else `as_supported`."""
    if x is None:
        return None
    return as_float32(x) if x.dim() == 1 else as_supported(x)


def gradient_or_zeros(incoming: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An incoming gradient with a dense last dimension. None (output unused) becomes zeros in `like`'s dtype, expanded
    from one row so that no full tensor is allocated."""
    if incoming is None:
        return like.new_zeros(shape[-1]).expand(shape)
    return dense(incoming)


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor of x's shape, in `dtype` or x's own."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def empty_gradient(x: Tensor) -> Tensor:
    """Uninitialised gradient of an input that a backend reads with `as_supported`."""
    return empty_like(x, None if x.dtype in DTYPES else torch.float32)


def empty_weight_gradient(weight: Tensor | None, beside: Tensor) -> Tensor:
    """Uninitialised float32 gradient of a weight; an empty tensor on `beside`'s device for a weight that is None."""
    return beside.new_empty(0, dtype=torch.float32) if weight is None else empty_like(weight, torch.float32)


def pixels_first(x: Tensor) -> Tensor:
    """[B, C, H, W] as contiguous [B, H, W, C]; no copy if x is channels-last."""
    return x.permute(0, 2, 3, 1).contiguous()


def empty_channels_last(x: Tensor, height: int, width: int) -> Tensor:
    """An uninitialised [B, C, height, width] like x [B, C, H, W]."""
    shape = *x.shape[:2], height, width
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def empty_bias_gradient(x: Tensor, wanted: bool) -> Tensor:
    """Uninitialised float32 gradient [N] of the bias that x [..., N] contains; an empty tensor if it is not wanted."""
    return x.new_empty(x.shape[-1] if wanted else 0, dtype=torch.float32)


def in_units(strides: Sequence[int]) -> tuple[int, list[int]]:
    """The largest unit, at most 8 elements, that divides all strides, and the strides counted in it, for a Triton
    kernel. Triton cannot see by itself that a stride of 72 is a multiple of 8, so it would not load 8 bfloat16 numbers
    (16 bytes) at once."""
    unit = gcd(8, *strides)
    return unit, [stride // unit for stride in strides]
