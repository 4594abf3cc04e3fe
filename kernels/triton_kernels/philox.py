"""Philox4x32-10 on CUDA: the draws of unite_fast/randomness.py, one launch each.

Blocks of four words are numbered across all samples, so that a scalar draw of 64 images is one program and a large draw
leaves no thread idle. Integers and uniforms equal the definition bit for bit.

Box and Muller's functions are float64, rounded once, as the definition requires: in float32, the logarithm of a number
close to 1 and an angle close to a zero lose their digits. The logarithm is the library's. Its cosine and sine are not
used: they keep an array in local memory for angles that never occur here."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from unite_fast.kernels.triton_kernels.rows import cdiv

BLOCKS = 256
"""Blocks per program of 4 warps: 8 numbers per thread."""
KEYS = ["step", "stream_and_draw", "seed_low", "seed_high"]
"""Arguments that change with each call: Triton must not specialise kernels on their values."""


@triton.jit
def words(o_block, position, step, stream_and_draw, seed_low, seed_high):
    """The four words of each block. `position` is int64; its high word counts steps after `step`. The other counter
    words and the key are passed as signed 32-bit integers."""
    b_same = tl.zeros_like(o_block)
    return tl.philox_impl(
        o_block.to(tl.uint32),
        (b_same + position).to(tl.uint32),
        (b_same + step + (position >> 32)).to(tl.uint32),
        (b_same + stream_and_draw).to(tl.uint32),
        seed_low.to(tl.uint32),
        seed_high.to(tl.uint32),
    )


@triton.jit
def _turn(b_word):
    """cos and sin, float64, of the angle `b_word` 2 pi / 2^32, as in csrc/normal.h: subtract the nearest quarter turn,
    then sum Taylor's series until its terms are below 6e-17 of the sum."""
    b_quarters = ((b_word >> 29) + 1) >> 1
    b_n = b_quarters.to(tl.float64)
    # The last factor is separate and pi / 2 has two parts, for the reasons in csrc/normal.h.
    b_angle = b_word.to(tl.float64) * 6.283185307179586 * 2.0**-32
    b_r = (b_angle - b_n * 1.5707963267948966) - b_n * 6.123233995736766e-17
    b_z = b_r * b_r
    b_s = b_z * (-1 / 1307674368000) + 1 / 6227020800
    b_s = b_s * b_z - 1 / 39916800
    b_s = b_s * b_z + 1 / 362880
    b_s = b_s * b_z - 1 / 5040
    b_s = b_s * b_z + 1 / 120
    b_s = b_s * b_z - 1 / 6
    b_s = b_r + b_r * (b_z * b_s)
    b_c = b_z * (1 / 20922789888000) - 1 / 87178291200
    b_c = b_c * b_z + 1 / 479001600
    b_c = b_c * b_z - 1 / 3628800
    b_c = b_c * b_z + 1 / 40320
    b_c = b_c * b_z - 1 / 720
    b_c = b_c * b_z + 1 / 24
    b_c = b_c * b_z - 1 / 2
    b_c = b_c * b_z + 1.0
    m_odd = (b_quarters & 1) != 0
    b_cos, b_sin = tl.where(m_odd, b_s, b_c), tl.where(m_odd, b_c, b_s)
    return tl.where(((b_quarters + 1) & 2) != 0, -b_cos, b_cos), tl.where((b_quarters & 2) != 0, -b_sin, b_sin)


@triton.jit
def box_muller(b_length, b_angle):
    b_radius = tl.sqrt(-2.0 * tl.log((b_length.to(tl.float64) + 0.5) * 2.0**-32))
    b_cos, b_sin = _turn(b_angle)
    return (b_radius * b_cos).to(tl.float32), (b_radius * b_sin).to(tl.float32)


@triton.jit
def _interleave(b_0, b_1, b_2, b_3):
    """The four numbers of each block, in order."""
    return tl.interleave(tl.interleave(b_0, b_2), tl.interleave(b_1, b_3))


@triton.jit
def normals(o_block, position, step, stream_and_draw, seed_low, seed_high):
    """The normals of blocks of Philox, four per block, in order."""
    b_w0, b_w1, b_w2, b_w3 = words(o_block, position, step, stream_and_draw, seed_low, seed_high)
    b_n0, b_n1 = box_muller(b_w0, b_w1)
    b_n2, b_n3 = box_muller(b_w2, b_w3)
    return _interleave(b_n0, b_n1, b_n2, b_n3)


@triton.jit
def _place(positions, samples, elements, BLOCKS: tl.constexpr, WHOLE: tl.constexpr):
    """A program's blocks: number in the sample, position of the sample, offsets of the results in [draws, samples,
    elements], and their mask. WHOLE: 4 divides `elements`, so the results of a block are neighbours."""
    i_chunk, i_f = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    blocks = tl.cast(tl.cdiv(elements, 4), tl.int64)
    o = i_chunk * BLOCKS + tl.arange(0, BLOCKS)
    position = tl.load(positions + o // blocks, mask=o < samples * blocks, other=0)
    o_number = i_chunk * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    m = o_number < samples * blocks * 4
    if not WHOLE:
        o_element = o_number % (4 * blocks)
        o_number = o_number // (4 * blocks) * elements + o_element
        m = m & (o_element < elements)
    return o % blocks, position, i_f * samples * elements + o_number, m


@triton.jit(do_not_specialize=KEYS)
def _words_kernel(
    positions,
    out,
    step,
    stream_and_draw,
    seed_low,
    seed_high,
    samples,
    elements,
    BLOCKS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    o_block, position, o, m = _place(positions, samples, elements, BLOCKS, WHOLE)
    stream_and_draw += tl.program_id(1)
    b_w0, b_w1, b_w2, b_w3 = words(o_block, position, step, stream_and_draw, seed_low, seed_high)
    tl.store(out + o, _interleave(b_w0, b_w1, b_w2, b_w3).to(tl.int64), mask=m)


@triton.jit(do_not_specialize=KEYS)
def _uniforms_kernel(
    positions,
    out,
    step,
    stream_and_draw,
    seed_low,
    seed_high,
    samples,
    elements,
    BLOCKS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    o_block, position, o, m = _place(positions, samples, elements, BLOCKS, WHOLE)
    stream_and_draw += tl.program_id(1)
    b_w0, b_w1, b_w2, b_w3 = words(o_block, position, step, stream_and_draw, seed_low, seed_high)
    b_high = (_interleave(b_w0, b_w1, b_w2, b_w3) >> 9).to(tl.float32)
    tl.store(out + o, (b_high + 0.5) * 2.0**-23, mask=m)


@triton.jit(do_not_specialize=KEYS)
def _normals_kernel(
    positions,
    out,
    step,
    stream_and_draw,
    seed_low,
    seed_high,
    samples,
    elements,
    BLOCKS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    o_block, position, o, m = _place(positions, samples, elements, BLOCKS, WHOLE)
    stream_and_draw += tl.program_id(1)
    tl.store(out + o, normals(o_block, position, step, stream_and_draw, seed_low, seed_high), mask=m)


def _draw(
    kernel, seed: int, step: int, stream: int, draws: range, positions: Tensor, elements: int, out: Tensor
) -> None:
    """Fill `out` [draws, samples, elements] with one launch. `draws` has step 1."""
    if out.numel():
        blocks = len(positions) * cdiv(elements, 4)
        kernel[(cdiv(blocks, BLOCKS), len(draws))](
            positions.contiguous(),
            out,
            *as_int32(step, (stream << 16) + draws.start, seed & 0xFFFFFFFF, seed >> 32),
            len(positions),
            elements,
            BLOCKS=BLOCKS,
            WHOLE=elements % 4 == 0,
        )


def philox_words(seed: int, step: int, stream: int, draws: range, positions: Tensor, elements: int) -> Tensor:
    """The words of `unite_fast.randomness.Philox.words`: positions int64 [b] -> int64 [draws, b, elements]."""
    out = positions.new_empty((len(draws), len(positions), elements))
    _draw(_words_kernel, seed, step, stream, draws, positions, elements, out)
    return out


def philox_uniforms(seed: int, step: int, stream: int, draws: range, positions: Tensor, elements: int) -> Tensor:
    """The uniforms of `unite_fast.randomness.Philox.uniform`: positions int64 [b] -> float32 [draws, b, elements]."""
    out = positions.new_empty((len(draws), len(positions), elements), dtype=torch.float32)
    _draw(_uniforms_kernel, seed, step, stream, draws, positions, elements, out)
    return out


def philox_normals(seed: int, step: int, stream: int, draws: range, positions: Tensor, elements: int) -> Tensor:
    """The normals of `unite_fast.randomness.Philox.normal`: positions int64 [b] -> float32 [draws, b, elements]."""
    out = positions.new_empty((len(draws), len(positions), elements), dtype=torch.float32)
    _draw(_normals_kernel, seed, step, stream, draws, positions, elements, out)
    return out


def as_int32(*words: int) -> tuple[int, ...]:
    """Words below 2^32 as signed 32-bit integers with the same bits: Triton compiles another kernel for 64-bit
    integers."""
    return tuple(word - 2**32 if word >= 2**31 else word for word in words)
