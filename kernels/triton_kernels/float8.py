"""Rounding rows to float8 on CUDA; kernels/float8.py has the formula.

A warp takes a row, in pieces of `PIECE` columns, twice: once for its largest element, once to divide and round. The
second time the row comes from the cache. The largest element is found among the bits of |x|, which are ordered as the
numbers are, with NaN above infinity."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from unite_fast.kernels import float8
from unite_fast.kernels.triton_kernels.rows import cdiv, channels, load

ROWS, PIECE, EACH = 4, 512, 16
"""Rows of a program; columns of a piece; neighbouring columns of a thread, one access of 16 bytes of float8."""


@triton.jit
def _quantise_kernel(
    x,
    values,
    scale,
    rows,
    K: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    EACH: tl.constexpr,
):
    INFINITY: tl.constexpr = 0x7F800000
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    b_bits = tl.zeros((ROWS, PIECE), tl.int32)
    for i_piece in range(0, K, PIECE):
        o_k = i_piece + channels(PIECE, EACH)
        b_x = load(x, o_row[:, None] * K + o_k[None, :], m_row[:, None] & (o_k < K)[None, :])
        b_bits = tl.maximum(b_bits, b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    b_bits = tl.max(b_bits, axis=1)
    b_ratio = tl.div_rn(b_bits.to(tl.float32, bitcast=True), LARGEST)
    b_power = ((b_ratio.to(tl.int32, bitcast=True) + 0x7FFFFF) & INFINITY).to(tl.float32, bitcast=True)
    b_scale = tl.where(b_bits < INFINITY, tl.maximum(b_power, SMALLEST_SCALE), float("nan"))
    tl.store(scale + o_row, b_scale, mask=m_row)
    b_inverse = tl.div_rn(1.0, b_scale)
    for i_piece in range(0, K, PIECE):
        o_k = i_piece + channels(PIECE, EACH)
        o = o_row[:, None] * K + o_k[None, :]
        m = m_row[:, None] & (o_k < K)[None, :]
        b_values = load(x, o, m) * b_inverse[:, None]
        tl.store(values + o, b_values.to(values.dtype.element_ty), mask=m)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> values float8_e4m3fn [M, K], scale float32 [M, 1]."""
    rows, width = x.shape
    values, scale = x.new_empty(x.shape, dtype=float8.E4M3), x.new_empty((rows, 1), dtype=torch.float32)
    if rows:
        constants = {"LARGEST": float8.LARGEST, "SMALLEST_SCALE": float8.SMALLEST_SCALE}
        _quantise_kernel[(cdiv(rows, ROWS),)](
            x.contiguous(), values, scale, rows, K=width, **constants, ROWS=ROWS, PIECE=PIECE, EACH=EACH
        )
    return values, scale
