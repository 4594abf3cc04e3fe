"""tap_distance on CUDA: a forward and a backward kernel, each of which reads the features once.

A program is one warp, so that no sum over channels needs a barrier. It processes `tiles` tiles of one image, [BW, BC]
each: BW windows of 2x2 pixels, one after the other of a window's four pixels. Odd sides have windows that reach over
the edge; masked lanes pad the channels to a power of two. float32 inside. Each program writes one partial sum of the
distance; these are summed in a fixed order. Only the inputs are saved: backward recomputes norms, masks and maxima.

Dropout computes the words of a tile's four pixels at once, one or two in each thread; `tl.gather` brings a pixel's
words to the threads that hold its channels, by a shuffle. Calling Philox in each of those threads would be a quarter of
all instructions."""

import torch
import triton
import triton.language as tl

from unite_fast.kernels import tensors
from unite_fast.kernels.tap_distance import EPS
from unite_fast.kernels.tensors import empty_channels_last, pixels_first
from unite_fast.kernels.triton_kernels.philox import KEYS, as_int32, words
from unite_fast.kernels.triton_kernels.rows import cdiv, load, load_row, next_power_of_2

ELEMENTS = 256
"""Elements per tile: 8 per thread, one access of 16 bytes in bfloat16."""
TILES, PROGRAMS = 8, 32
"""Most tiles per program, and programs per image before a program gets more than one tile."""


@triton.jit
def _first_pixel(o_w, width):
    """Row and column of the first pixel of each window. Beyond the last window, the row is beyond the image."""
    columns = (width + 1) // 2
    return 2 * (o_w // columns), 2 * (o_w % columns)


@triton.jit
def _pixel(row, column, P, height, width, C: tl.constexpr, BC: tl.constexpr):
    """Pixel P of each window: whether it is in the image, and offsets of its channels in [B, pixels, C] with their
    mask."""
    row, column = row + P // 2, column + P % 2
    m_p = (row < height) & (column < width)
    o_p = row * width + column
    o_c = tl.arange(0, BC)
    first = tl.program_id(0).to(tl.int64) * height * width
    return m_p, (first + o_p)[:, None] * C + o_c[None, :], m_p[:, None] & (o_c < C)[None, :]


@triton.jit
def _pooled(row, column, height, width, C: tl.constexpr, BC: tl.constexpr):
    """Offsets of each window's channels in [B, pooled pixels, C], and their mask: windows inside the image."""
    o_c = tl.arange(0, BC)
    m = ((row + 1 < height) & (column + 1 < width))[:, None] & (o_c < C)[None, :]
    first = tl.program_id(0).to(tl.int64) * (height // 2) * (width // 2)
    return (first + row // 2 * (width // 2) + column // 2)[:, None] * C + o_c[None, :], m


@triton.jit
def _features(b_x, b_bias):
    b_x = b_x.to(tl.float32)
    if b_bias is not None:
        b_x = tl.maximum(b_x + b_bias, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return b_x


@triton.jit
def _inverse_norm(b_x, EPS: tl.constexpr):
    b_norm = tl.sqrt(tl.sum(b_x * b_x, axis=1))
    return b_norm, 1.0 / (b_norm + EPS)


@triton.jit
def _words(
    i_tile,
    width,
    position,
    step,
    stream_and_draw,
    seed_low,
    seed_high,
    C: tl.constexpr,
    BC: tl.constexpr,
    BW: tl.constexpr,
):
    """The random words of a tile: of each of the four pixels, each window and each 32 channels, [4 BW BC/32]."""
    WORDS: tl.constexpr = BC // 32
    o = tl.arange(0, 4 * BW * WORDS)
    P, o_w = o // (BW * WORDS), i_tile * BW + o // WORDS % BW
    row, column = _first_pixel(o_w, width)
    o_p = (row + P // 2) * width + column + P % 2
    o_word = o_p * (C // 32) + o % WORDS
    b_w0, b_w1, b_w2, b_w3 = words(o_word // 4, position, step, stream_and_draw, seed_low, seed_high)
    b_low, b_high = tl.where(o_word % 2 == 0, b_w0, b_w1), tl.where(o_word % 2 == 0, b_w2, b_w3)
    return tl.where(o_word % 4 < 2, b_low, b_high)


@triton.jit
def _kept(b_x, b_words, P, BC: tl.constexpr, BW: tl.constexpr):
    """b_x [BW, BC] of pixel P where dropout keeps it, else 0."""
    WORDS: tl.constexpr = BW * BC // 32
    b_word = tl.gather(b_words, P * WORDS + tl.arange(0, WORDS), 0)
    b_bits = (b_word[:, None] >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1
    return tl.where(tl.reshape(b_bits, (BW, BC)) != 0, b_x, 0.0)


@triton.jit(do_not_specialize=KEYS)
def _tap_distance_fwd_kernel(
    y,
    x,
    weight,
    bias,
    positions,
    partial,
    pooled_y,
    pooled_x,
    step,
    stream_and_draw,
    seed_low,
    seed_high,
    height,
    width,
    tiles,
    share,
    C: tl.constexpr,
    BC: tl.constexpr,
    BW: tl.constexpr,
    EPS: tl.constexpr,
):
    i_b, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b_weight, b_bias = load_row(weight, C, BC), None
    if bias is not None:
        b_bias = load_row(bias, C, BC)
    if positions is not None:
        position = tl.load(positions + i_b)
        b_weight *= 2.0  # of the elements that dropout keeps
    b_sum = tl.zeros((BW, BC), tl.float32)
    for i in range(tiles):
        i_tile = i_chunk * tiles + i
        row, column = _first_pixel(i_tile * BW + tl.arange(0, BW), width)
        if positions is not None:
            b_words = _words(i_tile, width, position, step, stream_and_draw, seed_low, seed_high, C, BC, BW)
        if pooled_y is not None:
            b_max_y = tl.full((BW, BC), float("-inf"), tl.float32)
            b_max_x = tl.full((BW, BC), float("-inf"), tl.float32)
        for P in range(4):
            m_p, o, m = _pixel(row, column, P, height, width, C, BC)
            b_y = _features(tl.load(y + o, mask=m, other=0.0), b_bias)
            b_x = _features(tl.load(x + o, mask=m, other=0.0), b_bias)
            _, b_inverse_y = _inverse_norm(b_y, EPS)
            _, b_inverse_x = _inverse_norm(b_x, EPS)
            # With a bias, a pixel outside the image has features too.
            b_inverse_y, b_inverse_x = tl.where(m_p, b_inverse_y, 0.0), tl.where(m_p, b_inverse_x, 0.0)
            b_error = b_x * b_inverse_x[:, None] - b_y * b_inverse_y[:, None]
            if positions is not None:
                b_error = _kept(b_error, b_words, P, BC, BW)
            b_sum += b_error * b_error * b_weight
            if pooled_y is not None:
                b_max_y = tl.maximum(b_max_y, b_y, propagate_nan=tl.PropagateNan.ALL)
                b_max_x = tl.maximum(b_max_x, b_x, propagate_nan=tl.PropagateNan.ALL)
        if pooled_y is not None:
            o, m = _pooled(row, column, height, width, C, BC)
            tl.store(pooled_y + o, b_max_y.to(pooled_y.dtype.element_ty), mask=m)
            tl.store(pooled_x + o, b_max_x.to(pooled_x.dtype.element_ty), mask=m)
    tl.store(partial + i_b * tl.num_programs(1) + i_chunk, share * tl.sum(tl.sum(b_sum, axis=1), axis=0))


@triton.jit(do_not_specialize=KEYS)
def _tap_distance_bwd_kernel(
    d_distance,
    d_pooled_y,
    y,
    x,
    weight,
    bias,
    positions,
    d_y,
    step,
    stream_and_draw,
    seed_low,
    seed_high,
    d_distance_stride,
    height,
    width,
    tiles,
    share,
    C: tl.constexpr,
    BC: tl.constexpr,
    BW: tl.constexpr,
    EPS: tl.constexpr,
):
    i_b, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b_weight, b_bias = load_row(weight, C, BC), None
    if bias is not None:
        b_bias = load_row(bias, C, BC)
    b_weight *= 2.0 * share * tl.load(d_distance + i_b * d_distance_stride).to(tl.float32)
    if positions is not None:
        position = tl.load(positions + i_b)
        b_weight *= 2.0
    for i in range(tiles):
        i_tile = i_chunk * tiles + i
        row, column = _first_pixel(i_tile * BW + tl.arange(0, BW), width)
        if positions is not None:
            b_words = _words(i_tile, width, position, step, stream_and_draw, seed_low, seed_high, C, BC, BW)
        if d_pooled_y is not None:
            b_argmax = tl.zeros((BW, BC), tl.int32)
            b_max = tl.full((BW, BC), float("-inf"), tl.float32)
            for P in range(4):
                # Without bias and ReLU: they are the same for all four.
                _, o, m = _pixel(row, column, P, height, width, C, BC)
                b_y = load(y, o, m)
                m_larger = (b_y > b_max) | (b_y != b_y)
                b_argmax, b_max = tl.where(m_larger, P, b_argmax), tl.where(m_larger, b_y, b_max)
            o, m = _pooled(row, column, height, width, C, BC)
            b_d_max = load(d_pooled_y, o, m)
        for P in range(4):
            _, o, m = _pixel(row, column, P, height, width, C, BC)
            b_y = _features(tl.load(y + o, mask=m, other=0.0), b_bias)
            b_x = _features(tl.load(x + o, mask=m, other=0.0), b_bias)
            b_norm, b_inverse_y = _inverse_norm(b_y, EPS)
            _, b_inverse_x = _inverse_norm(b_x, EPS)
            b_inverse_y = b_inverse_y[:, None]
            b_d_unit = b_weight * (b_y * b_inverse_y - b_x * b_inverse_x[:, None])
            if positions is not None:
                b_d_unit = _kept(b_d_unit, b_words, P, BC, BW)
            # The gradient of y / (|y| + eps) is d / (|y| + eps) - y (d . y) / (|y| (|y| + eps)^2), without the second
            # term for |y| = 0.
            b_along = tl.sum(b_d_unit * b_y, axis=1) / tl.where(b_norm > 0, b_norm, 1.0)
            b_d_y = b_inverse_y * (b_d_unit - b_y * b_inverse_y * b_along[:, None])
            if d_pooled_y is not None:
                b_d_y += tl.where(b_argmax == P, b_d_max, 0.0)
            if b_bias is not None:
                b_d_y = tl.where(b_y <= 0, 0.0, b_d_y)
            tl.store(d_y + o, b_d_y.to(d_y.dtype.element_ty), mask=m)


def tap_distance_forward(y, x, weight, bias, positions, seed_low, seed_high, step, stream, draw, pool):
    """y and x [B, C, H, W], weight and bias [C] (bias may be None), positions int64 [B] or None, the words of the seed,
    step, stream and draw -> distance [B] float32, pooled y and x [B, C, H // 2, W // 2], empty without `pool`."""
    (_, _, height, width), sizes = y.shape, _sizes(y)
    grid, tiles = _grid(y, sizes)
    partial = y.new_empty(grid, dtype=torch.float32)
    pooled = [empty_channels_last(y, height // 2, width // 2) if pool else y.new_empty(0) for _ in range(2)]
    if partial.numel():
        _tap_distance_fwd_kernel[grid](
            *_inputs(y, x, weight, bias, positions),
            partial,
            *(pooled if pool else (None, None)),
            *as_int32(step, (stream << 16) + draw, seed_low, seed_high),
            *(height, width, tiles, 1 / (height * width)),
            **sizes,
        )
    return partial.sum(-1), *pooled


def tap_distance_backward(
    d_distance, d_pooled_y, d_pooled_x, y, x, weight, bias, positions, seed_low, seed_high, step, stream, draw
):
    """d_distance [B], d_pooled_y [B, C, H // 2, W // 2], either may be None, and what was saved -> (d_y like y,
    channels-last,)."""
    (_, _, height, width), sizes = y.shape, _sizes(y)
    d_y = empty_channels_last(y, height, width)
    if d_distance is None:
        d_distance = y.new_zeros(1, dtype=torch.float32).expand(len(y))
    if d_y.numel():
        grid, tiles = _grid(y, sizes)
        _tap_distance_bwd_kernel[grid](
            d_distance,
            None if d_pooled_y is None or not d_pooled_y.numel() else pixels_first(d_pooled_y),
            *_inputs(y, x, weight, bias, positions),
            d_y,
            *as_int32(step, (stream << 16) + draw, seed_low, seed_high),
            *(d_distance.stride(0), height, width, tiles, 1 / (height * width)),
            **sizes,
        )
    return (d_y,)


def _inputs(y, x, weight, bias, positions):
    positions = None if positions is None else positions.contiguous()
    return pixels_first(y), pixels_first(x), tensors.as_float32(weight), tensors.as_float32(bias), positions


def _sizes(y) -> dict[str, int]:
    lanes = next_power_of_2(y.shape[1])
    return {"C": y.shape[1], "BC": lanes, "BW": max(1, ELEMENTS // lanes), "EPS": EPS, "num_warps": 1}


def _grid(y, sizes: dict[str, int]) -> tuple[tuple[int, int], int]:
    """Programs for each image, and tiles per program."""
    windows = cdiv(y.shape[2], 2) * cdiv(y.shape[3], 2)
    tiles = min(TILES, max(1, windows // (sizes["BW"] * PROGRAMS)))
    return (y.shape[0], cdiv(windows, sizes["BW"] * tiles)), tiles
