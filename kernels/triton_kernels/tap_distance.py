"""tap_distance on CUDA: a forward and a backward kernel. A program processes `TILES` tiles of pixels of one image,
[BP, BC] each, in registers; masked lanes pad the channels to a power of two. float32 inside. Each program writes one
partial sum of the distance; these are summed in a fixed order. Only the inputs are saved: backward recomputes the
norms."""

import torch
import triton
import triton.language as tl

from unite_fast.kernels import tensors
from unite_fast.kernels.tap_distance import EPS, empty_channels_last, pixels_first
from unite_fast.kernels.triton_kernels.rows import cdiv, load, load_row, next_power_of_2

ELEMENTS = 2048
"""Elements per tile: 16 per thread of 4 warps."""
TILES = 8


@triton.jit
def _inverse_norm(b_x, EPS: tl.constexpr):
    b_norm = tl.sqrt(tl.sum(b_x * b_x, axis=1))
    return b_norm, 1.0 / (b_norm + EPS)


@triton.jit
def _tile(i_tile, pixels, C: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """Offsets of a tile in [B, pixels, C], and their mask."""
    o_p = i_tile * BP + tl.arange(0, BP)
    o_c = tl.arange(0, BC)
    o = (tl.program_id(0).to(tl.int64) * pixels + o_p)[:, None] * C + o_c[None, :]
    return o, (o_p < pixels)[:, None] & (o_c < C)[None, :]


@triton.jit
def _tap_distance_fwd_kernel(
    y,
    x,
    weight,
    mask,
    partial,
    pixels,
    share,
    C: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    TILES: tl.constexpr,
    EPS: tl.constexpr,
):
    i_chunk = tl.program_id(1).to(tl.int64)
    b_weight = load_row(weight, C, BC)
    b_sum = tl.zeros((BP,), tl.float32)
    for i in range(TILES):
        o, m = _tile(i_chunk * TILES + i, pixels, C, BC, BP)
        b_y, b_x = load(y, o, m), load(x, o, m)
        _, b_inverse_y = _inverse_norm(b_y, EPS)
        _, b_inverse_x = _inverse_norm(b_x, EPS)
        b_error = b_x * b_inverse_x[:, None] - b_y * b_inverse_y[:, None]
        b_error = b_error * b_error * b_weight
        if mask is not None:
            b_error *= load(mask, o, m)
        b_sum += tl.sum(b_error, axis=1)
    p_partial = partial + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + i_chunk
    tl.store(p_partial, share * tl.sum(b_sum, axis=0))


@triton.jit
def _tap_distance_bwd_kernel(
    d_out,
    y,
    x,
    weight,
    mask,
    d_y,
    d_out_stride,
    pixels,
    share,
    C: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    TILES: tl.constexpr,
    EPS: tl.constexpr,
):
    i_chunk = tl.program_id(1).to(tl.int64)
    b_weight = load_row(weight, C, BC)
    factor = 2.0 * share * tl.load(d_out + tl.program_id(0).to(tl.int64) * d_out_stride).to(tl.float32)
    for i in range(TILES):
        o, m = _tile(i_chunk * TILES + i, pixels, C, BC, BP)
        b_y, b_x = load(y, o, m), load(x, o, m)
        b_norm, b_inverse_y = _inverse_norm(b_y, EPS)
        _, b_inverse_x = _inverse_norm(b_x, EPS)
        b_inverse_y = b_inverse_y[:, None]
        b_d_unit = factor * b_weight * (b_y * b_inverse_y - b_x * b_inverse_x[:, None])
        if mask is not None:
            b_d_unit *= load(mask, o, m)
        # Gradient of y / (|y| + eps): d / (|y| + eps) - y (d . y) / (|y| (|y| + eps)^2); no second term for |y| = 0.
        b_along = tl.sum(b_d_unit * b_y, axis=1) / tl.where(b_norm > 0, b_norm, 1.0)
        b_d_y = b_inverse_y * (b_d_unit - b_y * b_inverse_y * b_along[:, None])
        tl.store(d_y + o, b_d_y.to(d_y.dtype.element_ty), mask=m)


def tap_distance_forward(y, x, weight, mask):
    """y, x and mask [B, C, H, W], weight [C] -> (distance [B] float32,)."""
    b, pixels, sizes = y.shape[0], y.shape[2] * y.shape[3], _sizes(y)
    partial = y.new_empty((b, _chunks(pixels, sizes)), dtype=torch.float32)
    if partial.numel():
        inputs = _inputs(y, x, weight, mask)
        _tap_distance_fwd_kernel[partial.shape](*inputs, partial, pixels, 1 / pixels, **sizes)
    return (partial.sum(-1),)


def tap_distance_backward(d_out, y, x, weight, mask):
    """d_out [B] and what was saved -> (d_y like y, channels-last,)."""
    b, pixels, sizes, d_y = y.shape[0], y.shape[2] * y.shape[3], _sizes(y), empty_channels_last(y)
    if d_y.numel():
        inputs = _inputs(y, x, weight, mask)
        _tap_distance_bwd_kernel[(b, _chunks(pixels, sizes))](
            d_out, *inputs, d_y, d_out.stride(0), pixels, 1 / pixels, **sizes
        )
    return (d_y,)


def _inputs(y, x, weight, mask):
    mask = None if mask is None else pixels_first(mask)
    return pixels_first(y), pixels_first(x), tensors.as_float32(weight), mask


def _sizes(y) -> dict[str, int]:
    lanes = next_power_of_2(y.shape[1])
    return {"C": y.shape[1], "BC": lanes, "BP": max(1, ELEMENTS // lanes), "TILES": TILES, "EPS": EPS}


def _chunks(pixels: int, sizes: dict[str, int]) -> int:
    return cdiv(pixels, sizes["BP"] * TILES)
