"""bias_relu on CUDA: a program takes ROWS pixels with all their channels, in backward ELEMENTS numbers in a row. Masked
lanes pad the channels to a power of two."""

import triton
import triton.language as tl

from unite_fast.kernels import tensors
from unite_fast.kernels.tensors import empty_channels_last, pixels_first
from unite_fast.kernels.triton_kernels.rows import cdiv, load, load_row, next_power_of_2

ELEMENTS = 4096
"""Elements per program of 4 warps: 32 per thread."""


@triton.jit
def _bias_relu_fwd_kernel(x, bias, out, pixels, C: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr):
    o_p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = tl.arange(0, BC)
    o, m = o_p[:, None] * C + o_c[None, :], (o_p < pixels)[:, None] & (o_c < C)[None, :]
    b_out = tl.maximum(load(x, o, m) + load_row(bias, C, BC), 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + o, b_out.to(out.dtype.element_ty), mask=m)


@triton.jit
def _bias_relu_bwd_kernel(d_out, out, d_x, elements, ELEMENTS: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    m = o < elements
    b_d_x = tl.where(load(out, o, m) <= 0, 0.0, load(d_out, o, m))
    tl.store(d_x + o, b_d_x.to(d_x.dtype.element_ty), mask=m)


def bias_relu_forward(x, bias):
    """x [B, C, H, W], bias [C] -> (out [B, C, H, W], channels-last,)."""
    out, c = empty_channels_last(x, *x.shape[2:]), x.shape[1]
    if out.numel():
        lanes = next_power_of_2(c)
        pixels, rows = out.numel() // c, max(1, ELEMENTS // lanes)
        grid = (cdiv(pixels, rows),)
        _bias_relu_fwd_kernel[grid](pixels_first(x), tensors.as_float32(bias), out, pixels, C=c, BC=lanes, ROWS=rows)
    return (out,)


def bias_relu_backward(d_out, out):
    """d_out and out [B, C, H, W] -> (d_x [B, C, H, W], channels-last,)."""
    d_x, elements = empty_channels_last(out, *out.shape[2:]), out.numel()
    if elements:
        grid = (cdiv(elements, ELEMENTS),)
        _bias_relu_bwd_kernel[grid](pixels_first(d_out), pixels_first(out), d_x, elements, ELEMENTS=ELEMENTS)
    return (d_x,)
