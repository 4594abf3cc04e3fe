"""LayerNorm on CUDA, for the Linears that follow one: a forward and a backward kernel, and one that sums the gradients
of the weights.

    x_out = x + branch                                with a branch (else x_out = x)
    n = (x_out - mean(x_out)) / sqrt(var(x_out) + eps),   out = n * weight + bias

A program processes `TOKENS` rows, one after another, with weight and bias in registers. float32 inside. Each program
writes one partial sum of the gradients of weight and bias; these are summed in a fixed order.
"""

import torch
import triton
import triton.language as tl

from unite_fast.kernels import tensors
from unite_fast.kernels.triton_kernels.rows import TOKENS, load, row_sizes
from unite_fast.kernels.triton_kernels.sums import sum_rows


@triton.jit
def _layer_norm_fwd_kernel(
    x,
    branch,
    weight,
    bias,
    x_out,
    out,
    mean,
    rstd,
    rows,
    eps,
    D: tl.constexpr,
    BD: tl.constexpr,
    TOKENS: tl.constexpr,
):
    i_first = tl.program_id(0).to(tl.int64) * TOKENS
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_weight = load(weight, o_d, m_d)
    b_bias = load(bias, o_d, m_d)
    for i_row in range(i_first, tl.minimum(i_first + TOKENS, rows)):
        b_x = load(x + i_row * D, o_d, m_d)
        if branch is not None:
            b_x += load(branch + i_row * D, o_d, m_d)
            # The next op reads the rounded residual, so out is computed from it too.
            b_x = b_x.to(x_out.dtype.element_ty)
            tl.store(x_out + i_row * D + o_d, b_x, mask=m_d)
            b_x = b_x.to(tl.float32)
        b_mean = tl.sum(b_x, axis=0) / D
        b_x = tl.where(m_d, b_x - b_mean, 0.0)
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / D + eps)
        tl.store(mean + i_row, b_mean)
        tl.store(rstd + i_row, b_rstd)
        b_out = b_x * b_rstd * b_weight + b_bias
        tl.store(out + i_row * D + o_d, b_out.to(out.dtype.element_ty), mask=m_d)


@triton.jit
def _layer_norm_bwd_kernel(
    d_x_out,
    d_out,
    x,
    weight,
    bias,
    mean,
    rstd,
    d_x,
    d_branch,
    out,
    partial,
    rows,
    D: tl.constexpr,
    BD: tl.constexpr,
    TOKENS: tl.constexpr,
    BRANCH_BIAS: tl.constexpr,
):
    i_first = tl.program_id(0).to(tl.int64) * TOKENS
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_weight = load(weight, o_d, m_d)
    b_bias = load(bias, o_d, m_d)
    b_d_weight = tl.zeros((BD,), tl.float32)
    b_d_bias = tl.zeros((BD,), tl.float32)
    b_d_branch_bias = tl.zeros((BD,), tl.float32)
    for i_row in range(i_first, tl.minimum(i_first + TOKENS, rows)):
        b_x = load(x + i_row * D, o_d, m_d)
        b_g = load(d_out + i_row * D, o_d, m_d)
        if d_x_out is not None:
            b_d_x_out = load(d_x_out + i_row * D, o_d, m_d)
        b_rstd = tl.load(rstd + i_row)
        b_n = tl.where(m_d, (b_x - tl.load(mean + i_row)) * b_rstd, 0.0)
        b_d_weight += b_g * b_n
        b_d_bias += b_g
        b_a = b_g * b_weight
        b_d_x = b_rstd * (b_a - tl.sum(b_a, axis=0) / D - b_n * (tl.sum(b_a * b_n, axis=0) / D))
        if d_x_out is not None:
            b_d_x += b_d_x_out
        tl.store(d_x + i_row * D + o_d, b_d_x.to(d_x.dtype.element_ty), mask=m_d)
        if d_branch is not None:
            tl.store(d_branch + i_row * D + o_d, b_d_x.to(d_branch.dtype.element_ty), mask=m_d)
        if BRANCH_BIAS:
            b_d_branch_bias += b_d_x
        tl.store(out + i_row * D + o_d, (b_n * b_weight + b_bias).to(out.dtype.element_ty), mask=m_d)
    p_partial = partial + tl.program_id(0).to(tl.int64) * D + o_d
    next_sum = tl.num_programs(0).to(tl.int64) * D
    tl.store(p_partial, b_d_weight, mask=m_d)
    tl.store(p_partial + next_sum, b_d_bias, mask=m_d)
    if BRANCH_BIAS:
        tl.store(p_partial + 2 * next_sum, b_d_branch_bias, mask=m_d)


def layer_norm_forward(x, weight, bias, eps, out_dtype):
    """x [..., D], weight and bias [D] -> out [..., D] in `out_dtype`, mean and rstd [..., 1] float32."""
    return _forward(x, None, weight, bias, eps, out_dtype)[1:]


def residual_layer_norm_forward(x, branch, weight, bias, eps, out_dtype):
    """layer_norm_forward of x + branch, both [..., D] -> x_out like x, out, mean, rstd."""
    return _forward(x, branch, weight, bias, eps, out_dtype)


def _forward(x, branch, weight, bias, eps, out_dtype):
    x, out = x.contiguous(), tensors.empty_like(x, out_dtype)
    x_out = None
    if branch is not None:
        x_out, branch = tensors.empty_like(x), tensors.as_supported(branch).contiguous()
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(2))
    if out.numel():
        pointers = x, branch, *map(tensors.as_float32, (weight, bias)), x_out, out, mean, rstd
        _layer_norm_fwd_kernel[_grid(x)](*pointers, mean.numel(), eps, **row_sizes(x.shape[-1]))
    return x_out, out, mean, rstd


def layer_norm_backward_recompute(d_out, x, weight, bias, mean, rstd):
    """d_out and x [..., D] and what was saved -> d_x like x, d_weight and d_bias [D] float32, out like d_out."""
    d_x, _, d_weight, d_bias, _, out = _backward(None, d_out, x, None, weight, bias, mean, rstd, False)
    return d_x, d_weight, d_bias, out


def residual_layer_norm_backward_recompute(
    d_x_out, d_out, x_out, weight, bias, mean, rstd, branch_dtype, branch_bias_gradient
):
    """d_x_out like x_out or None -> d_x, d_branch in `branch_dtype`, d_weight, d_bias, the sum of d_branch [D] float32
    (empty unless `branch_bias_gradient`), out as above."""
    if d_x_out is not None:
        d_x_out = d_x_out.contiguous()
    d_branch = tensors.empty_like(x_out, branch_dtype)
    return _backward(d_x_out, d_out, x_out, d_branch, weight, bias, mean, rstd, branch_bias_gradient)


def _backward(d_x_out, d_out, x, d_branch, weight, bias, mean, rstd, branch_bias_gradient):
    x, d_x, out = x.contiguous(), tensors.empty_like(x), tensors.empty_like(d_out)
    partial = x.new_empty((2 + branch_bias_gradient, *_grid(x), x.shape[-1]), dtype=torch.float32)
    if d_x.numel():
        inputs = d_x_out, d_out.contiguous(), x, *map(tensors.as_float32, (weight, bias)), mean, rstd
        constants = row_sizes(x.shape[-1]) | {"BRANCH_BIAS": branch_bias_gradient}
        _layer_norm_bwd_kernel[_grid(x)](*inputs, d_x, d_branch, out, partial, mean.numel(), **constants)
    d_weight, d_bias, *d_branch_bias = sum_rows(partial)
    return d_x, d_branch, d_weight, d_bias, *(d_branch_bias or [x.new_empty(0, dtype=torch.float32)]), out


def _grid(x) -> tuple[int]:
    return (triton.cdiv(x.shape[:-1].numel(), TOKENS),)
