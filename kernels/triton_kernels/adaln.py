"""adaln_modulate, gated_residual_adaln and gated_residual_norm_adaln on CUDA: one forward and one backward
kernel for all three, and one that adds up partial sums.

    y     = x + gate * branch                       with a branch
    x_out = y / rms(y) * norm_weight                with a norm (else x_out = y)
    h     = x_out / rms(x_out) * weight * (1 + scale) + shift

A program processes tokens of one sample, one row after another, with the sample's vectors in registers. While it
reduces a row, the loads of the next one are in flight (tl.range with three stages: cp.async into shared memory). All
arithmetic is float32. Each backward program writes one partial sum per gradient of a vector; these are summed in a
fixed order. The gradients of weight and scale need the same sum: that of d_h times the normalised x_out."""

import torch
import triton
import triton.language as tl

from unite_fast.kernels import tensors
from unite_fast.kernels.triton_kernels.rows import (
    cdiv,
    channels,
    load,
    next_power_of_2,
    tokens_of_program,
    tokens_per_program,
)

WARPS = {"forward": 2, "backward": 4}
"""Warps per row of at most `WIDE` channels; a wider one gets twice as many. One warp per row would need no barrier, but
the backward pass, with five sums in registers, then spills."""
WIDE = 1024
PIECE = 256
"""Channels that the warps of a row load at once: no lane is idle at 768."""
PROGRAMS = {"forward": ((16, 16), (12, 12), (11, 10)), "backward": ((8, 8), (6, 5), (4, 4))}
"""Programs that a multiprocessor holds at once, by registers (benchmarks/cross_compile.py, Triton 3.6 and 3.9): of the
op without a branch, with one, and with a norm too; each for rows of at most three pieces, and of four. Half as many for
rows with twice the warps."""
SUM_ROWS, SUM_LANES = 64, 16
"""Size of a tile of partial sums, 8 numbers per thread."""
SHIFT, FACTOR, GATE, BIAS = (tl.constexpr(number) for number in range(4))
"""Numbers of the partial sums. That of the norm's weight follows those that an op has."""


@triton.jit
def _rms_rstd(b_x, eps, D: tl.constexpr):
    return tl.rsqrt(tl.sum(b_x * b_x, axis=0) / D + eps)


@triton.jit
def _adaln_fwd_kernel(
    x,
    branch,
    gate,
    norm_weight,
    weight,
    shift,
    scale,
    x_out,
    h,
    rstd,
    x_stride_b,
    x_stride_t,
    branch_stride_b,
    branch_stride_t,
    gate_stride,
    shift_stride,
    scale_stride,
    T,
    tokens,
    eps,
    D: tl.constexpr,
    BD: tl.constexpr,
    EACH: tl.constexpr,
    UNIT: tl.constexpr,
):
    i_b, first, end = tokens_of_program(T, tokens)
    o_d = channels(BD, EACH)
    m_d = o_d < D
    b_shift = load(shift + i_b * shift_stride * UNIT, o_d, m_d)
    b_factor = load(weight, o_d, m_d) * (1 + load(scale + i_b * scale_stride * UNIT, o_d, m_d))
    if branch is not None:
        b_gate = load(gate + i_b * gate_stride * UNIT, o_d, m_d)
    if norm_weight is not None:
        b_norm_weight = load(norm_weight, o_d, m_d)
    for i_t in tl.range(first, end, num_stages=3):
        i_row = i_b * T + i_t
        b_x = load(x + (i_b * x_stride_b + i_t * x_stride_t) * UNIT, o_d, m_d)
        if branch is not None:
            b_x += b_gate * load(branch + (i_b * branch_stride_b + i_t * branch_stride_t) * UNIT, o_d, m_d)
            if norm_weight is not None:
                b_r = _rms_rstd(b_x, eps, D)
                tl.store(rstd + i_row, b_r)
                b_x = b_x * b_r * b_norm_weight
            # The next op reads the rounded residual, so h is computed from it too.
            b_x = b_x.to(x_out.dtype.element_ty)
            tl.store(x_out + i_row * D + o_d, b_x, mask=m_d)
            b_x = b_x.to(tl.float32)
        b_r = _rms_rstd(b_x, eps, D)
        p_rstd = rstd + i_row
        if norm_weight is not None:
            p_rstd += tl.num_programs(0).to(tl.int64) * T
        tl.store(p_rstd, b_r)
        tl.store(h + i_row * D + o_d, (b_x * b_r * b_factor + b_shift).to(h.dtype.element_ty), mask=m_d)


@triton.jit
def _norm_back(b_a, b_n, b_r, D: tl.constexpr):
    """The gradient of x, where b_a is the gradient of n = x / rms(x)."""
    return b_r * (b_a - b_n * (tl.sum(b_a * b_n, axis=0) / D))


@triton.jit
def _adaln_bwd_kernel(
    d_x_out,
    d_h,
    x,
    branch,
    gate,
    norm_weight,
    weight,
    shift,
    scale,
    rstd,
    d_x,
    d_branch,
    h,
    partial,
    d_x_out_stride_b,
    d_x_out_stride_t,
    d_h_stride_b,
    d_h_stride_t,
    x_stride_b,
    x_stride_t,
    branch_stride_b,
    branch_stride_t,
    gate_stride,
    shift_stride,
    scale_stride,
    T,
    tokens,
    D: tl.constexpr,
    BD: tl.constexpr,
    EACH: tl.constexpr,
    UNIT: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
):
    i_b, first, end = tokens_of_program(T, tokens)
    o_d = channels(BD, EACH)
    m_d = o_d < D
    b_factor = load(weight, o_d, m_d) * (1 + load(scale + i_b * scale_stride * UNIT, o_d, m_d))
    if h is not None:
        b_shift = load(shift + i_b * shift_stride * UNIT, o_d, m_d)
    b_d_shift = tl.zeros((BD,), tl.float32)
    b_d_factor = tl.zeros((BD,), tl.float32)
    if branch is not None:
        b_gate = load(gate + i_b * gate_stride * UNIT, o_d, m_d)
        b_d_gate = tl.zeros((BD,), tl.float32)
    if norm_weight is not None:
        b_norm_weight = load(norm_weight, o_d, m_d)
        b_d_norm_weight = tl.zeros((BD,), tl.float32)
    if BIAS_GRADIENT:
        b_d_y_sum = tl.zeros((BD,), tl.float32)
    for i_t in tl.range(first, end, num_stages=3):
        i_row = i_b * T + i_t
        b_x = load(x + (i_b * x_stride_b + i_t * x_stride_t) * UNIT, o_d, m_d)
        p_rstd = rstd + i_row
        if branch is not None:
            b_branch = load(branch + (i_b * branch_stride_b + i_t * branch_stride_t) * UNIT, o_d, m_d)
            b_d_x_out = load(d_x_out + (i_b * d_x_out_stride_b + i_t * d_x_out_stride_t) * UNIT, o_d, m_d)
        b_d_h = load(d_h + (i_b * d_h_stride_b + i_t * d_h_stride_t) * UNIT, o_d, m_d)
        if norm_weight is not None:
            # x and branch were saved; recompute the normalised y and x_out.
            b_norm_r = tl.load(p_rstd)
            p_rstd += tl.num_programs(0).to(tl.int64) * T
            b_y = (b_x + b_gate * b_branch) * b_norm_r
            b_x = (b_y * b_norm_weight).to(x.dtype.element_ty).to(tl.float32)
        b_r = tl.load(p_rstd)
        b_n = b_x * b_r
        if h is not None:
            tl.store(h + i_row * D + o_d, (b_n * b_factor + b_shift).to(h.dtype.element_ty), mask=m_d)
        b_d_shift += b_d_h
        b_d_factor += b_d_h * b_n
        b_d_x = _norm_back(b_d_h * b_factor, b_n, b_r, D)
        if branch is not None:
            b_d_x += b_d_x_out
            if norm_weight is not None:
                b_d_norm_weight += b_d_x * b_y
                b_d_x = _norm_back(b_d_x * b_norm_weight, b_y, b_norm_r, D)
            b_d_gate += b_d_x * b_branch
            if BIAS_GRADIENT:
                b_d_y_sum += b_d_x
            tl.store(d_branch + i_row * D + o_d, (b_d_x * b_gate).to(d_branch.dtype.element_ty), mask=m_d)
        tl.store(d_x + i_row * D + o_d, b_d_x.to(d_x.dtype.element_ty), mask=m_d)
    p_partial = partial + (i_b * tl.num_programs(1) + tl.program_id(1)) * D + o_d
    next_sum = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * D
    tl.store(p_partial + SHIFT * next_sum, b_d_shift, mask=m_d)
    tl.store(p_partial + FACTOR * next_sum, b_d_factor, mask=m_d)
    if branch is not None:
        tl.store(p_partial + GATE * next_sum, b_d_gate, mask=m_d)
    if BIAS_GRADIENT:
        tl.store(p_partial + BIAS * next_sum, b_d_y_sum * b_gate, mask=m_d)
    if norm_weight is not None:
        norm: tl.constexpr = 4 if BIAS_GRADIENT else 3
        tl.store(p_partial + norm * next_sum, b_d_norm_weight, mask=m_d)


@triton.jit
def _sample_sums(
    partial, i_sum, i_b, samples, chunks, o_d, m_d, D: tl.constexpr, SAMPLES: tl.constexpr, CHUNKS: tl.constexpr
):
    """Sums over the programs of each of SAMPLES samples from i_b on, [SAMPLES, lanes]."""
    o_b, o_chunk = i_b + tl.arange(0, SAMPLES), tl.arange(0, CHUNKS)
    o_row = (i_sum * samples + o_b).to(tl.int64)[:, None] * chunks + o_chunk[None, :]
    m = (o_b < samples)[:, None] & (o_chunk < chunks)[None, :]
    p_partial = partial + o_row[:, :, None] * D + o_d[None, None, :]
    return tl.sum(tl.load(p_partial, mask=m[:, :, None] & m_d[None, None, :], other=0.0), axis=1)


@triton.jit
def _adaln_sums_kernel(
    partial,
    weight,
    scale,
    d_shift,
    d_scale,
    d_gate,
    d_weight,
    d_norm_weight,
    d_bias,
    scale_stride,
    samples,
    chunks,
    D: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Axis 0 of the grid counts pieces of D, axis 1 the sums. Those of a sample's vectors are stored, those of the
    weights are summed over the samples too."""
    i_sum = tl.program_id(1)
    o_d = tl.program_id(0) * LANES + tl.arange(0, LANES)
    m_d = o_d < D
    b_weight = load(weight, o_d, m_d)[None, :]
    b_all = tl.zeros((SAMPLES, LANES), tl.float32)
    for i_b in range(0, samples, SAMPLES):
        o_b = i_b + tl.arange(0, SAMPLES)
        o = o_b.to(tl.int64)[:, None] * D + o_d[None, :]
        m = (o_b < samples)[:, None] & m_d[None, :]
        b_sum = _sample_sums(partial, i_sum, i_b, samples, chunks, o_d, m_d, D, SAMPLES, CHUNKS)
        if i_sum == SHIFT:
            tl.store(d_shift + o, b_sum.to(d_shift.dtype.element_ty), mask=m)
        elif i_sum == FACTOR:
            tl.store(d_scale + o, (b_sum * b_weight).to(d_scale.dtype.element_ty), mask=m)
            b_sum *= 1 + load(scale, o_b.to(tl.int64)[:, None] * scale_stride + o_d[None, :], m)
        elif d_gate is not None and i_sum == GATE:
            tl.store(d_gate + o, b_sum.to(d_gate.dtype.element_ty), mask=m)
        b_all += b_sum
    b_all = tl.sum(b_all, axis=0)
    if i_sum == FACTOR:
        tl.store(d_weight + o_d, b_all, mask=m_d)
    elif d_bias is not None and i_sum == BIAS:
        tl.store(d_bias + o_d, b_all, mask=m_d)
    elif d_norm_weight is not None and i_sum == tl.num_programs(1) - 1:
        tl.store(d_norm_weight + o_d, b_all, mask=m_d)


def _forward(x, branch, gate, norm_weight, weight, shift, scale, eps, out_dtype):
    (b, t, _), x = x.shape, tensors.dense(x)
    h, rstd = tensors.empty_like(x, out_dtype), x.new_empty((b, t), dtype=torch.float32)
    x_out = None if branch is None else tensors.empty_like(x)
    if norm_weight is not None:
        rstd = x.new_empty((2, b, t), dtype=torch.float32)
    norm_weight, weight, shift, scale = map(tensors.as_input, (norm_weight, weight, shift, scale))
    branch, gate = map(tensors.as_input, (branch, gate))
    if h.numel():
        strides = *_two(x), *_two(branch), _one(gate), _one(shift), _one(scale)
        pointers = x, branch, gate, norm_weight, weight, shift, scale, x_out, h, rstd
        grid, tokens, constants = _sizes("forward", x, branch, norm_weight)
        unit, strides = tensors.in_units(strides)
        _adaln_fwd_kernel[grid](*pointers, *strides, t, tokens, eps, **constants, UNIT=unit)
    return x_out, h, rstd


def _backward(d_x_out, d_h, x, branch, gate, norm_weight, weight, scale, rstd, branch_bias_gradient=False, shift=None):
    """Gradients of x, branch, gate, norm_weight, weight, shift, scale and the branch's bias, None for an input that the
    op does not have; and h in d_h's dtype if shift is not None, else None."""
    (_, t, d), x = x.shape, tensors.dense(x)
    d_x, d_branch = tensors.empty_like(x), None if branch is None else tensors.empty_gradient(branch)
    h = None if shift is None else tensors.empty_like(d_h)
    d_h = tensors.gradient_or_zeros(d_h, x.shape, x)
    if branch is not None:
        d_x_out = tensors.gradient_or_zeros(d_x_out, x.shape, x)
    own = norm_weight, weight, branch, gate, shift, scale
    norm_weight, weight, branch, gate, shift, scale = map(tensors.as_input, own)
    grid, tokens, constants = _sizes("backward", x, branch, norm_weight)
    sums = 2 + (gate is not None) + branch_bias_gradient + (norm_weight is not None)
    partial = x.new_empty((sums, *grid, d), dtype=torch.float32)
    if d_x.numel():
        strides = *_two(d_x_out), *_two(d_h), *_two(x), *_two(branch), _one(gate), _one(shift), _one(scale)
        inputs = d_x_out, d_h, x, branch, gate, norm_weight, weight, shift, scale, rstd
        unit, strides = tensors.in_units(strides)
        pointers = *inputs, d_x, d_branch, h, partial
        constants |= {"UNIT": unit, "BIAS_GRADIENT": branch_bias_gradient}
        _adaln_bwd_kernel[grid](*pointers, *strides, t, tokens, **constants)
    d_shift, d_scale, d_gate = (None if v is None else tensors.empty_like(v) for v in (scale, scale, gate))
    d_weight, d_norm_weight = (None if v is None else torch.empty_like(v) for v in (weight, norm_weight))
    d_bias = x.new_empty(d, dtype=torch.float32) if branch_bias_gradient else None
    if d:
        lanes = next_power_of_2(max(partial.shape[2], 1))
        _adaln_sums_kernel[(cdiv(d, SUM_LANES), sums)](
            *(partial, weight, scale, d_shift, d_scale, d_gate, d_weight, d_norm_weight, d_bias),
            *(scale.stride(0), *partial.shape[1:3]),
            D=d,
            SAMPLES=max(SUM_ROWS // lanes, 1),
            CHUNKS=lanes,
            LANES=SUM_LANES,
        )
    return d_x, d_branch, d_gate, d_norm_weight, d_weight, d_shift, d_scale, d_bias, h


def _sizes(direction: str, x, branch, norm_weight):
    """The grid of a kernel, its tokens per program, and its constants."""
    b, t, d = x.shape
    wide = 2 if d > WIDE else 1
    warps, piece = WARPS[direction] * wide, PIECE * wide
    programs = PROGRAMS[direction][(branch is not None) + (norm_weight is not None)][d > 3 * piece]
    tokens = tokens_per_program(x, cdiv(programs, wide))
    constants = {"D": d, "BD": next_power_of_2(d), "EACH": piece // (32 * warps), "num_warps": warps}
    return (b, cdiv(t, tokens)), tokens, constants


def _two(x):
    return (0, 0) if x is None else x.stride()[:2]


def _one(x):
    return 0 if x is None else x.stride(0)


def adaln_modulate_forward(x, weight, shift, scale, eps, out_dtype):
    """x [B, T, D], weight [D], shift and scale [B, D] -> h [B, T, D], rstd [B, T] float32."""
    return _forward(x, None, None, None, weight, shift, scale, eps, out_dtype)[1:]


def adaln_modulate_backward(d_out, x, weight, scale, rstd):
    """-> gradients of x, weight, shift and scale."""
    d_x, _, _, _, *others, _, _ = _backward(None, d_out, x, None, None, None, weight, scale, rstd)
    return d_x, *others


def gated_residual_adaln_forward(x, branch, gate, weight, shift, scale, branch_bias, eps, out_dtype):
    """x and branch [B, T, D], gate, shift and scale [B, D], weight [D] -> x_out and h [B, T, D], rstd [B, T]. branch
    contains branch_bias already."""
    return _forward(x, branch, gate, None, weight, shift, scale, eps, out_dtype)


def gated_residual_adaln_backward(d_x_out, d_h, x_out, branch, gate, weight, scale, rstd, branch_bias_gradient):
    """-> gradients of x, branch, gate, weight, shift, scale and the branch's bias; the last is empty unless
    `branch_bias_gradient`."""
    inputs = d_x_out, d_h, x_out, branch, gate, weight, None, scale, rstd, branch_bias_gradient
    return gated_residual_adaln_backward_recompute(*inputs)[:-1]


def gated_residual_adaln_backward_recompute(
    d_x_out, d_h, x_out, branch, gate, weight, shift, scale, rstd, branch_bias_gradient
):
    """gated_residual_adaln_backward that also recomputes h, in d_h's dtype -> its gradients, and h."""
    inputs = d_x_out, d_h, x_out, branch, gate, None, weight, scale, rstd, branch_bias_gradient, shift
    d_x, d_branch, d_gate, _, *others, d_bias, h = _backward(*inputs)
    return d_x, d_branch, d_gate, *others, _or_empty(d_bias, x_out), h


def gated_residual_norm_adaln_forward(x, branch, gate, norm_weight, weight, shift, scale, branch_bias, eps, out_dtype):
    """As gated_residual_adaln_forward, with norm_weight [D] -> x_out, h, rstd of y and of x_out, [2, B, T]."""
    return _forward(x, branch, gate, norm_weight, weight, shift, scale, eps, out_dtype)


def gated_residual_norm_adaln_backward(
    d_x_out, d_h, x, branch, gate, norm_weight, weight, scale, rstds, branch_bias_gradient
):
    """-> gradients of x, branch, gate, norm_weight, weight, shift, scale and the branch's bias, as above."""
    inputs = d_x_out, d_h, x, branch, gate, norm_weight, weight, scale, rstds, branch_bias_gradient
    *others, d_bias, _ = _backward(*inputs)
    return *others, _or_empty(d_bias, x)


def _or_empty(gradient, x):
    """An op returns a tensor for each input."""
    return tensors.empty_bias_gradient(x, False) if gradient is None else gradient
