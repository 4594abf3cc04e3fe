"""Float8 matmuls: both operands rounded to e4m3, with one scale per row.

    x [M, K]  ~  values * scale,    values = e4m3(x / scale),    scale [M, 1] a power of two
    a b^T     ~  (values_a values_b^T) * (scale_a scale_b^T)

e4m3 has 3 mantissa bits and reaches 448 (Micikevicius et al., arXiv 2209.05433). The scale of a row is the smallest
power of two with |x| / scale <= 448. Then dividing by it rounds nothing, and values * scale is exact in bfloat16.

In a Linear, the recipe is `rowwise_with_gw_hp` of torchao.float8, except for W in dx, where torchao has one scale:

    y  = x W^T       x has a scale per token, W one per output
    dx = dy W        dy has a scale per token, W one per input
    dW = dy^T x      in bfloat16

On CUDA, torch multiplies the float8 values. On a CPU, values * scale are multiplied in bfloat16 or float32: the same
products, in another order of summation. torchao itself is not used. Its casts are about ten PyTorch operators each, and
rely on torch.compile to fuse them; it does not see into our ops, so each cast would cost more than the matmul saves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unite_fast.kernels import backend
from unite_fast.kernels.fused_op import triton_function

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest e4m3 number."""
SMALLEST_SCALE = 2.0**-100
"""Scale of a row without anything above 3.5e-28, such as zeros. Scales multiply, and this keeps the products normal."""
MULTIPLE = 16
"""Widths of a float8 matmul on CUDA must be multiples of it (`torch.nn.functional.scaled_mm`)."""
CAPABILITY = 8, 9
"""The lowest compute capability with float8 matmuls: Ada; Hopper is 9.0."""

_enabled = False


@contextmanager
def float8_matmuls(enabled: bool = True) -> Iterator[None]:
    """Within a `with` block, Linears that are called with `wide=True` run in float8, and later their backward pass."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def runs_in_float8(wide: bool) -> bool:
    """Whether a Linear called now runs in float8."""
    return wide and _enabled


def why_missing(device: torch.device) -> str:
    """Why float8 matmuls cannot run on this device; empty if they can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= CAPABILITY:
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; float8 needs 8.9 (Ada, Hopper)"
    )


class Quantised(NamedTuple):
    values: Tensor
    """float8_e4m3fn [M, K]."""
    scale: Tensor
    """float32 [M, 1], powers of two; NaN in rows that are not finite."""


def quantise(x: Tensor) -> Quantised:
    """x [..., K], bfloat16 or float32, as rows. A row with an infinity or NaN gets the scale NaN: no product with it is
    finite."""
    x = x.reshape(-1, x.shape[-1])
    if backend.fused_backend_on(x.device) == "triton":
        return Quantised(*_triton_quantise(x))
    return quantise_ref(x)


_triton_quantise = triton_function("float8", "quantise")


def quantise_ref(x: Tensor) -> Quantised:
    """`quantise` of x [M, K] in plain PyTorch."""
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    # Bits of a float32: one of the sign, eight of the exponent, 23 of the mantissa. This rounds up to a power of two.
    power = (((largest / LARGEST).view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    scale = torch.where(largest.isfinite(), power.clamp(min=SMALLEST_SCALE), torch.nan)
    return Quantised((x.float() / scale).to(E4M3), scale)


def quantise_columns(x: Tensor) -> Quantised:
    """`quantise` of the columns of x [M, K]: values [K, M], scale [K, 1]."""
    return quantise(x.mT)


def dequantise(x: Quantised, dtype: torch.dtype) -> Tensor:
    """[M, K] in bfloat16 or float32, exactly."""
    return (x.values.float() * x.scale).to(dtype)


def scaled_matmul(a: Quantised, b: Quantised, bias: Tensor | None) -> Tensor:
    """a b^T + bias: a [M, K], b [N, K], bias bfloat16 [N] -> bfloat16 [M, N]."""
    # Fast accumulation keeps fewer bits of the sums, far more than e4m3 has. Hopper's row-wise kernel is slow without.
    rows = F.ScalingType.RowWise
    return F.scaled_mm(
        *(a.values, b.values.mT, a.scale, rows, b.scale.mT, rows),
        bias=bias,
        output_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
