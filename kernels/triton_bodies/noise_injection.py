"""noise_injection on CUDA, and the normals of unite_fast/randomness.py alone.

A thread turns each block of Philox4x32-10 into four neighbouring normals, so it writes them in one access of 16 bytes
where 4 divides a sample's elements. Box and Muller's functions are float64, rounded once, as the definition has it: in
float32 the logarithm of a number close to 1 and an angle close to a zero lose their digits. The work is small: three
draws for 64 images take some 10^8 operations. The logarithm is the library's; its cosine and sine are not used, since
for angles that never occur here they keep an array in local memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from unite_fast.kernels import layout

BLOCKS = 256
"""Of Philox, a program of 4 warps: 8 normals a thread."""
ELEMENTS = 1024
"""A program of the backward pass: 8 a thread."""


@triton.jit
def _words(o_block, position, step, stream_and_draw, seed_low, seed_high):
    """The four words of each block. The counter's other words and the key are bits of a 32-bit integer of any sign."""
    b_same = tl.zeros_like(o_block)
    return tl.philox_impl(
        o_block.to(tl.uint32),
        (b_same + position).to(tl.uint32),
        (b_same + step).to(tl.uint32),
        (b_same + stream_and_draw).to(tl.uint32),
        seed_low.to(tl.uint32),
        seed_high.to(tl.uint32),
    )


@triton.jit
def _turn(b_word):
    """cos and sin, float64, of the angle `b_word` 2 pi / 2^32, as csrc/normal.h has them: what is left beyond the
    nearest quarter turn, then Taylor's series, which ends below 6e-17 of the sum."""
    b_quarters = ((b_word >> 29) + 1) >> 1
    b_n = b_quarters.to(tl.float64)
    # The last factor by itself, and pi / 2 in two parts, for the reasons given there.
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
def _pair(b_length, b_angle):
    b_radius = tl.sqrt(-2.0 * tl.log((b_length.to(tl.float64) + 0.5) * 2.0**-32))
    b_cos, b_sin = _turn(b_angle)
    return (b_radius * b_cos).to(tl.float32), (b_radius * b_sin).to(tl.float32)


@triton.jit
def _normals(i_chunk, position, step, stream_and_draw, seed_low, seed_high, BLOCKS: tl.constexpr):
    """The normals of BLOCKS blocks of a sample, in their order."""  # [4 BLOCKS]
    o_block = i_chunk * BLOCKS + tl.arange(0, BLOCKS)
    b_w0, b_w1, b_w2, b_w3 = _words(o_block, position, step, stream_and_draw, seed_low, seed_high)
    b_n0, b_n1 = _pair(b_w0, b_w1)
    b_n2, b_n3 = _pair(b_w2, b_w3)
    return tl.interleave(tl.interleave(b_n0, b_n2), tl.interleave(b_n1, b_n3))


@triton.jit(do_not_specialize=["step", "stream_and_draw", "seed_low", "seed_high"])
def _normals_kernel(positions, out, step, stream_and_draw, seed_low, seed_high, elements, BLOCKS: tl.constexpr):
    i_b, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b_normal = _normals(i_chunk, tl.load(positions + i_b), step, stream_and_draw, seed_low, seed_high, BLOCKS)
    o = i_chunk.to(tl.int64) * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    tl.store(out + i_b * elements + o, b_normal, mask=o < elements)


@triton.jit(do_not_specialize=["step", "stream", "seed_low", "seed_high"])
def _noise_injection_fwd_kernel(
    z, t, positions, gate, out, step, stream, seed_low, seed_high, elements, BLOCKS: tl.constexpr
):
    i_b, i_chunk, i_f = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    i_sample = i_f * tl.num_programs(0).to(tl.int64) + i_b
    b_noise = _normals(i_chunk, tl.load(positions + i_b), step, stream * 65536 + i_f, seed_low, seed_high, BLOCKS)
    o = i_chunk.to(tl.int64) * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    m = o < elements
    b_z = tl.load(z + i_b * elements + o, mask=m, other=0.0).to(tl.float32)
    time = tl.load(t + i_sample)
    b_out = time * b_z + (1.0 - time) * b_noise
    if gate is not None:
        b_out = tl.where(tl.load(gate + i_b), b_out, b_z)
    tl.store(out + i_sample * elements + o, b_out, mask=m)


@triton.jit
def _noise_injection_bwd_kernel(d_out, t, gate, d_z, samples, draws, elements, ELEMENTS: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    m = o < elements
    b_d_z = tl.zeros((ELEMENTS,), tl.float32)
    i_sample = i_b
    for _ in range(draws):
        factor = tl.load(t + i_sample)
        if gate is not None:
            factor = tl.where(tl.load(gate + i_b), factor, 1.0)
        b_d_z += factor * tl.load(d_out + i_sample * elements + o, mask=m, other=0.0)
        i_sample += samples
    tl.store(d_z + i_b * elements + o, b_d_z, mask=m)


def noise_injection_forward(z, t, positions, gate, seed_low, seed_high, step, stream):
    """z [B, N, C], t [F, B], positions int64 [B], gate bool [B] or None, the words of the seed, step and stream ->
    (x_t [F, B, N, C] float32,)."""
    (draws, samples), elements = t.shape, z[0:1].numel()
    out = z.new_empty((*t.shape, *z.shape[1:]), dtype=torch.float32)
    if out.numel():
        _noise_injection_fwd_kernel[(samples, triton.cdiv(elements, 4 * BLOCKS), draws)](
            z.contiguous(),
            layout.floats(t),
            positions.contiguous(),
            None if gate is None else gate.contiguous(),
            out,
            *_as_int32(step, stream, seed_low, seed_high),
            elements,
            BLOCKS=BLOCKS,
        )
    return (out,)


def noise_injection_backward(d_out, t, gate):
    """d_out [F, B, N, C], t [F, B], gate bool [B] or None -> (d_z [B, N, C] float32,)."""
    (draws, samples), elements = t.shape, d_out[0, 0:1].numel()
    d_z = d_out.new_empty(d_out.shape[1:], dtype=torch.float32)
    if d_z.numel():
        _noise_injection_bwd_kernel[(samples, triton.cdiv(elements, ELEMENTS))](
            d_out.contiguous(),
            layout.floats(t),
            None if gate is None else gate.contiguous(),
            d_z,
            *(samples, draws, elements),
            ELEMENTS=ELEMENTS,
        )
    return (d_z,)


def philox_normals(seed: int, step: int, stream: int, draw: int, positions: Tensor, elements: int) -> Tensor:
    """The normals of `unite_fast.randomness.Philox.normal`: positions int64 [b] -> float32 [b, elements]."""
    out = positions.new_empty((len(positions), elements), dtype=torch.float32)
    if out.numel():
        words = _as_int32(step, (stream << 16) + draw, seed & 0xFFFFFFFF, seed >> 32)
        grid = len(positions), triton.cdiv(elements, 4 * BLOCKS)
        _normals_kernel[grid](positions.contiguous(), out, *words, elements, BLOCKS=BLOCKS)
    return out


def _as_int32(*words: int) -> tuple[int, ...]:
    """Words below 2^32 as integers of 32 bits with the same bits: of another size they would be another kernel."""
    return tuple(word - 2**32 if word >= 2**31 else word for word in words)
