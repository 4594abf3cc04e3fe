"""adaln_modulate, gated_residual_adaln and gated_residual_norm_adaln on CUDA: one forward and one backward
kernel for all three.

    y     = x + gate * branch                       with a branch
    x_out = y / rms(y) * norm_weight                with a norm (else x_out = y)
    h     = x_out / rms(x_out) * weight * (1 + scale) + shift

A program processes `TOKENS` tokens of one sample, one after another, with the sample's vectors in registers. All
arithmetic is float32. Each program writes one partial sum per gradient of a vector; these are summed in a fixed order,
by one kernel over the programs of each sample and by another over the samples. The gradients of weight and scale need
the same sum: that of d_h times the normalised x_out."""

import torch
import triton
import triton.language as tl

from unite_fast.kernels import tensors
from unite_fast.kernels.triton_kernels.rows import TOKENS, cdiv, load, row_sizes
from unite_fast.kernels.triton_kernels.sums import sum_rows

SUM_ROWS, SUM_LANES = 16, 64
"""Size of a tile of partial sums: 8 numbers per thread; 544 tokens have 34 rows."""


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
    eps,
    D: tl.constexpr,
    BD: tl.constexpr,
    TOKENS: tl.constexpr,
    UNIT: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    i_chunk = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_shift = load(shift + i_b * shift_stride * UNIT, o_d, m_d)
    b_factor = load(weight, o_d, m_d) * (1 + load(scale + i_b * scale_stride * UNIT, o_d, m_d))
    if branch is not None:
        b_gate = load(gate + i_b * gate_stride * UNIT, o_d, m_d)
    if norm_weight is not None:
        b_norm_weight = load(norm_weight, o_d, m_d)
    for i_t in range(i_chunk * TOKENS, tl.minimum((i_chunk + 1) * TOKENS, T)):
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
    D: tl.constexpr,
    BD: tl.constexpr,
    TOKENS: tl.constexpr,
    UNIT: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    i_chunk = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BD)
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
    for i_t in range(i_chunk * TOKENS, tl.minimum((i_chunk + 1) * TOKENS, T)):
        i_row = i_b * T + i_t
        b_x = load(x + (i_b * x_stride_b + i_t * x_stride_t) * UNIT, o_d, m_d)
        p_rstd = rstd + i_row
        if branch is not None:
            b_branch = load(branch + (i_b * branch_stride_b + i_t * branch_stride_t) * UNIT, o_d, m_d)
            # Loaded before the first sum over the row, so that all loads wait for memory together.
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
            tl.store(d_branch + i_row * D + o_d, (b_d_x * b_gate).to(d_branch.dtype.element_ty), mask=m_d)
        tl.store(d_x + i_row * D + o_d, b_d_x.to(d_x.dtype.element_ty), mask=m_d)
    p_partial = partial + (i_b * tl.num_programs(1) + i_chunk) * D + o_d
    next_sum = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * D
    tl.store(p_partial, b_d_shift, mask=m_d)
    tl.store(p_partial + next_sum, b_d_factor, mask=m_d)
    if branch is not None:
        tl.store(p_partial + 2 * next_sum, b_d_gate, mask=m_d)
    if norm_weight is not None:
        tl.store(p_partial + 3 * next_sum, b_d_norm_weight, mask=m_d)


@triton.jit
def _adaln_sums_kernel(
    partial,
    weight,
    scale,
    d_shift,
    d_scale,
    d_gate,
    over_samples,
    scale_stride,
    chunks,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    NORM: tl.constexpr,
):
    """Sums over one sample's programs: the gradients of its vectors, and its part of the gradients of the weights."""
    i_b, samples = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    o_d = tl.program_id(1) * LANES + tl.arange(0, LANES)
    m_d = o_d < D
    next_sum = samples * chunks * D
    b_d_shift = tl.zeros((ROWS, LANES), tl.float32)
    b_d_factor = tl.zeros((ROWS, LANES), tl.float32)
    b_d_gate = tl.zeros((ROWS, LANES), tl.float32)
    b_d_norm = tl.zeros((ROWS, LANES), tl.float32)
    for i_row in range(0, chunks, ROWS):
        o_row = i_row + tl.arange(0, ROWS)
        m = (o_row < chunks)[:, None] & m_d[None, :]
        p_partial = partial + (i_b * chunks + o_row)[:, None] * D + o_d[None, :]
        b_d_shift += tl.load(p_partial, mask=m, other=0.0)
        b_d_factor += tl.load(p_partial + next_sum, mask=m, other=0.0)
        if d_gate is not None:
            b_d_gate += tl.load(p_partial + 2 * next_sum, mask=m, other=0.0)
        if NORM:
            b_d_norm += tl.load(p_partial + 3 * next_sum, mask=m, other=0.0)
    o = i_b * D + o_d
    b_factor = tl.sum(b_d_factor, axis=0)
    b_d_scale = b_factor * tl.load(weight + o_d, mask=m_d, other=0.0)
    b_scale = load(scale + i_b * scale_stride, o_d, m_d)
    tl.store(d_shift + o, tl.sum(b_d_shift, axis=0).to(d_shift.dtype.element_ty), mask=m_d)
    tl.store(d_scale + o, b_d_scale.to(d_scale.dtype.element_ty), mask=m_d)
    tl.store(over_samples + o, b_factor * (1 + b_scale), mask=m_d)
    if d_gate is not None:
        tl.store(d_gate + o, tl.sum(b_d_gate, axis=0).to(d_gate.dtype.element_ty), mask=m_d)
    if NORM:
        tl.store(over_samples + samples * D + o, tl.sum(b_d_norm, axis=0), mask=m_d)


def _launch(kernel, x, pointers, arguments, strides) -> None:
    (b, t, d), (unit, strides) = x.shape, tensors.in_units(strides)
    kernel[(b, cdiv(t, TOKENS))](*pointers, *strides, t, *arguments, UNIT=unit, **row_sizes(d))


def _forward(x, branch, gate, norm_weight, weight, shift, scale, eps, out_dtype):
    (b, t, _), x = x.shape, tensors.dense(x)
    h, rstd = tensors.empty_like(x, out_dtype), x.new_empty((b, t), dtype=torch.float32)
    x_out = None if branch is None else tensors.empty_like(x)
    if norm_weight is not None:
        rstd = x.new_empty((2, b, t), dtype=torch.float32)
    shift, scale, weight, norm_weight = map(tensors.as_input, (shift, scale, weight, norm_weight))
    branch, gate = map(tensors.as_input, (branch, gate))
    if h.numel():
        strides = *_two(x), *_two(branch), _one(gate), _one(shift), _one(scale)
        pointers = x, branch, gate, norm_weight, weight, shift, scale, x_out, h, rstd
        _launch(_adaln_fwd_kernel, x, pointers, (eps,), strides)
    return x_out, h, rstd


def _backward(d_x_out, d_h, x, branch, gate, norm_weight, weight, scale, rstd, shift=None):
    """Gradients of x, branch, gate, norm_weight, weight, shift and scale, None for an input that the op does not have;
    and h in d_h's dtype if shift is not None, else None."""
    (b, t, d), x = x.shape, tensors.dense(x)
    d_x, d_branch = tensors.empty_like(x), None if branch is None else tensors.empty_gradient(branch)
    h = None if shift is None else tensors.empty_like(d_h)
    d_h = tensors.gradient_or_zeros(d_h, x.shape, x)
    if branch is not None:
        d_x_out = tensors.gradient_or_zeros(d_x_out, x.shape, x)
    own = norm_weight, weight, branch, gate, shift, scale
    sums = 2 + (branch is not None) + (norm_weight is not None)
    partial = x.new_empty((sums, b, cdiv(t, TOKENS), d), dtype=torch.float32)
    norm_weight, weight, branch, gate, shift, scale = map(tensors.as_input, own)
    if d_x.numel():
        strides = *_two(d_x_out), *_two(d_h), *_two(x), *_two(branch), _one(gate), _one(shift), _one(scale)
        inputs = d_x_out, d_h, x, branch, gate, norm_weight, weight, shift, scale, rstd
        pointers = *inputs, d_x, d_branch, h, partial
        _launch(_adaln_bwd_kernel, x, pointers, (), strides)
    d_shift, d_scale, d_gate = (None if v is None else tensors.empty_like(v) for v in (scale, scale, gate))
    over_samples = x.new_empty((1 + (norm_weight is not None), b, d), dtype=torch.float32)
    if d_shift.numel():
        _adaln_sums_kernel[(b, cdiv(d, SUM_LANES))](
            *(partial, weight, scale, d_shift, d_scale, d_gate, over_samples),
            *(scale.stride(0), partial.shape[2]),
            D=d,
            ROWS=SUM_ROWS,
            LANES=SUM_LANES,
            NORM=norm_weight is not None,
        )
    d_weight, *d_norm_weight = sum_rows(over_samples)
    return d_x, d_branch, d_gate, d_norm_weight[0] if d_norm_weight else None, d_weight, d_shift, d_scale, h


def _two(x):
    return (0, 0) if x is None else x.stride()[:2]


def _one(x):
    return 0 if x is None else x.stride(0)


def adaln_modulate_forward(x, weight, shift, scale, eps, out_dtype):
    """x [B, T, D], weight [D], shift and scale [B, D] -> h [B, T, D], rstd [B, T] float32."""
    return _forward(x, None, None, None, weight, shift, scale, eps, out_dtype)[1:]


def adaln_modulate_backward(d_out, x, weight, scale, rstd):
    """-> gradients of x, weight, shift and scale."""
    d_x, _, _, _, *others, _ = _backward(None, d_out, x, None, None, None, weight, scale, rstd)
    return d_x, *others


def gated_residual_adaln_forward(x, branch, gate, weight, shift, scale, eps, out_dtype):
    """x and branch [B, T, D], gate, shift and scale [B, D], weight [D] -> x_out, h [B, T, D], rstd [B, T]."""
    return _forward(x, branch, gate, None, weight, shift, scale, eps, out_dtype)


def gated_residual_adaln_backward(d_x_out, d_h, x_out, branch, gate, weight, scale, rstd):
    """-> gradients of x, branch, gate, weight, shift and scale."""
    return gated_residual_adaln_backward_recompute(d_x_out, d_h, x_out, branch, gate, weight, None, scale, rstd)[:-1]


def gated_residual_adaln_backward_recompute(d_x_out, d_h, x_out, branch, gate, weight, shift, scale, rstd):
    """gated_residual_adaln_backward that also recomputes h, in d_h's dtype -> gradients of x, branch, gate, weight,
    shift and scale, and h."""
    d_x, d_branch, d_gate, _, *others = _backward(d_x_out, d_h, x_out, branch, gate, None, weight, scale, rstd, shift)
    return d_x, d_branch, d_gate, *others


def gated_residual_norm_adaln_forward(x, branch, gate, norm_weight, weight, shift, scale, eps, out_dtype):
    """As gated_residual_adaln_forward, with norm_weight [D] -> x_out, h, rstd of y and of x_out, [2, B, T]."""
    return _forward(x, branch, gate, norm_weight, weight, shift, scale, eps, out_dtype)


def gated_residual_norm_adaln_backward(d_x_out, d_h, x, branch, gate, norm_weight, weight, scale, rstds):
    """-> gradients of x, branch, gate, norm_weight, weight, shift and scale."""
    return _backward(d_x_out, d_h, x, branch, gate, norm_weight, weight, scale, rstds)[:-1]
