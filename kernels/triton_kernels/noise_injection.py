"""noise_injection on CUDA. A thread turns each block of Philox into four neighbouring normals, so it writes the result
in one access of 16 bytes if 4 divides a sample's elements. The float64 work (philox.py) is small: three draws for 64
images take some 10^8 operations."""

import torch
import triton
import triton.language as tl

from unite_fast.kernels import tensors
from unite_fast.kernels.triton_kernels.philox import as_int32, normals
from unite_fast.kernels.triton_kernels.rows import cdiv, load

BLOCKS = 256
"""Blocks of Philox per program of 4 warps: 8 normals per thread."""
ELEMENTS = 1024
"""Elements per program of the backward pass: 8 per thread."""


@triton.jit(do_not_specialize=["step", "stream", "seed_low", "seed_high"])
def _noise_injection_fwd_kernel(
    z, t, positions, gate, out, step, stream, seed_low, seed_high, elements, BLOCKS: tl.constexpr
):
    i_b, i_chunk, i_f = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    i_sample = i_f * tl.num_programs(0).to(tl.int64) + i_b
    o_block = i_chunk * BLOCKS + tl.arange(0, BLOCKS)
    b_noise = normals(o_block, tl.load(positions + i_b), step, stream * 65536 + i_f, seed_low, seed_high)
    o = i_chunk.to(tl.int64) * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    m = o < elements
    b_z = load(z + i_b * elements, o, m)
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
        b_d_z += factor * load(d_out + i_sample * elements, o, m)
        i_sample += samples
    tl.store(d_z + i_b * elements + o, b_d_z, mask=m)


def noise_injection_forward(z, t, positions, gate, seed_low, seed_high, step, stream):
    """z [B, N, C], t [F, B], positions int64 [B], gate bool [B] or None, the words of the seed, step and stream ->
    (x_t [F, B, N, C] float32,)."""
    (draws, samples), elements = t.shape, z[0:1].numel()
    out = z.new_empty((*t.shape, *z.shape[1:]), dtype=torch.float32)
    if out.numel():
        _noise_injection_fwd_kernel[(samples, cdiv(elements, 4 * BLOCKS), draws)](
            z.contiguous(),
            tensors.as_float32(t),
            positions.contiguous(),
            None if gate is None else gate.contiguous(),
            out,
            *as_int32(step, stream, seed_low, seed_high),
            elements,
            BLOCKS=BLOCKS,
        )
    return (out,)


def noise_injection_backward(d_out, t, gate):
    """d_out [F, B, N, C], t [F, B], gate bool [B] or None -> (d_z [B, N, C] float32,)."""
    (draws, samples), elements = t.shape, d_out[0, 0:1].numel()
    d_z = d_out.new_empty(d_out.shape[1:], dtype=torch.float32)
    if d_z.numel():
        _noise_injection_bwd_kernel[(samples, cdiv(elements, ELEMENTS))](
            d_out.contiguous(),
            tensors.as_float32(t),
            None if gate is None else gate.contiguous(),
            d_z,
            *(samples, draws, elements),
            ELEMENTS=ELEMENTS,
        )
    return (d_z,)
