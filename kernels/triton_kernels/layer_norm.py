"""LayerNorm on CUDA, for the Linears that follow one: a forward and a backward kernel, and one that sums the gradients
of the weights.

    x_out = x + branch                                with a branch (else x_out = x)
    n = (x_out - mean(x_out)) / sqrt(var(x_out) + eps),   out = n * weight + bias

A forward program is one warp, and never waits for another. It processes `FORWARD_ROWS` rows one after another, and
loads the next row while it computes this one. A row is two pieces, each a power of two: 768 channels are 512 and 256,
so that no lane is idle at the usual widths. A backward program processes `BACKWARD_ROWS` rows: one warp for up to
`ONE_WARP` channels, else several, which wait for each other. All loads of a row come before the only sum over it.
float32 inside. Each backward program writes one partial sum of the gradients of weight, bias and the branch's bias;
these are summed in a fixed order.
"""

import torch
import triton
import triton.language as tl

from unite_fast.kernels import tensors
from unite_fast.kernels.triton_kernels.rows import cdiv, load, next_power_of_2
from unite_fast.kernels.triton_kernels.sums import sum_rows

FORWARD_ROWS, BACKWARD_ROWS = 8, 16
"""Rows per program. Each of the backward kernel's partial sums costs half a byte per element, written and read."""
ONE_WARP = 768
"""Channels up to which a backward program is one warp too. More than that would not fit into its registers."""
LANES_EACH = 16
"""Channels per thread of a larger backward program."""


@triton.jit
def _load_piece(x, branch, o_row, o_d, end, D: tl.constexpr):
    """A piece of rows of x and of branch, as they are in memory; x twice without a branch."""
    o = o_row[:, None] * D + o_d[None, :]
    m = (o_row < end)[:, None] & (o_d < D)[None, :]
    b_x = tl.load(x + o, mask=m, other=0.0)
    if branch is not None:
        return b_x, tl.load(branch + o, mask=m, other=0.0)
    else:
        return b_x, b_x


@triton.jit
def _add_piece(b_x, b_branch, x_out, o_row, o_d, end, D: tl.constexpr):
    """x_out in float32, 0 beyond the row; stores it if there is a branch."""
    if x_out is not None:
        m = (o_row < end)[:, None] & (o_d < D)[None, :]
        # The next op reads the rounded residual, so out is computed from it too.
        b_x = (b_x.to(tl.float32) + b_branch.to(tl.float32)).to(x_out.dtype.element_ty)
        tl.store(x_out + o_row[:, None] * D + o_d[None, :], b_x, mask=m)
    return b_x.to(tl.float32)


@triton.jit
def _store_piece(out, b_n, weight, bias, o_row, o_d, end, D: tl.constexpr):
    m_d = o_d < D
    b_out = b_n * load(weight, o_d, m_d)[None, :] + load(bias, o_d, m_d)[None, :]
    m = (o_row < end)[:, None] & m_d[None, :]
    tl.store(out + o_row[:, None] * D + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m)


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
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    EACH: tl.constexpr,
    FORWARD_ROWS: tl.constexpr,
):
    i_first = tl.program_id(0).to(tl.int64) * FORWARD_ROWS
    end = tl.minimum(i_first + FORWARD_ROWS, rows)
    o_1 = tl.arange(0, FIRST)
    o_2 = FIRST + tl.arange(0, SECOND)
    o_row = i_first + tl.arange(0, EACH)
    b_next_1, b_next_branch_1 = _load_piece(x, branch, o_row, o_1, end, D)
    b_next_2, b_next_branch_2 = _load_piece(x, branch, o_row, o_2, end, D)
    # Not tl.range with stages, as in adaln.py: for one warp, its copies in shared memory leave room for half the rows.
    for i_row in range(i_first, end, EACH):
        o_row = i_row + tl.arange(0, EACH)
        b_x_1, b_branch_1, b_x_2, b_branch_2 = b_next_1, b_next_branch_1, b_next_2, b_next_branch_2
        b_next_1, b_next_branch_1 = _load_piece(x, branch, o_row + EACH, o_1, end, D)
        b_next_2, b_next_branch_2 = _load_piece(x, branch, o_row + EACH, o_2, end, D)
        b_1 = _add_piece(b_x_1, b_branch_1, x_out, o_row, o_1, end, D)
        b_2 = _add_piece(b_x_2, b_branch_2, x_out, o_row, o_2, end, D)
        b_mean = (tl.sum(b_1, axis=1) + tl.sum(b_2, axis=1)) / D
        b_1 = tl.where((o_1 < D)[None, :], b_1 - b_mean[:, None], 0.0)
        b_2 = tl.where((o_2 < D)[None, :], b_2 - b_mean[:, None], 0.0)
        b_rstd = tl.rsqrt((tl.sum(b_1 * b_1, axis=1) + tl.sum(b_2 * b_2, axis=1)) / D + eps)
        tl.store(mean + o_row, b_mean, mask=o_row < end)
        tl.store(rstd + o_row, b_rstd, mask=o_row < end)
        _store_piece(out, b_1 * b_rstd[:, None], weight, bias, o_row, o_1, end, D)
        _store_piece(out, b_2 * b_rstd[:, None], weight, bias, o_row, o_2, end, D)


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
    BACKWARD_ROWS: tl.constexpr,
    BRANCH_BIAS: tl.constexpr,
):
    i_first = tl.program_id(0).to(tl.int64) * BACKWARD_ROWS
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_d_weight = tl.zeros((BD,), tl.float32)
    b_d_bias = tl.zeros((BD,), tl.float32)
    b_d_branch_bias = tl.zeros((BD,), tl.float32)
    for i_row in range(i_first, tl.minimum(i_first + BACKWARD_ROWS, rows)):
        b_x = load(x + i_row * D, o_d, m_d)
        b_g = load(d_out + i_row * D, o_d, m_d)
        if d_x_out is not None:
            b_d_x_out = load(d_x_out + i_row * D, o_d, m_d)
        b_rstd = tl.load(rstd + i_row)
        b_n = tl.where(m_d, (b_x - tl.load(mean + i_row)) * b_rstd, 0.0)
        b_d_weight += b_g * b_n
        b_d_bias += b_g
        # Loaded for each row, from a cache: they would take a quarter of the registers.
        b_weight = load(weight, o_d, m_d)
        b_out = b_n * b_weight + load(bias, o_d, m_d)
        tl.store(out + i_row * D + o_d, b_out.to(out.dtype.element_ty), mask=m_d)
        b_a = b_g * b_weight
        # Both sums over the row at once: the warps wait for each other once.
        b_mean, b_product = tl.split(tl.sum(tl.join(b_a, b_a * b_n), axis=0) / D)
        b_d_x = b_rstd * (b_a - b_mean - b_n * b_product)
        if d_x_out is not None:
            b_d_x += b_d_x_out
        tl.store(d_x + i_row * D + o_d, b_d_x.to(d_x.dtype.element_ty), mask=m_d)
        if d_branch is not None:
            tl.store(d_branch + i_row * D + o_d, b_d_x.to(d_branch.dtype.element_ty), mask=m_d)
        if BRANCH_BIAS:
            b_d_branch_bias += b_d_x
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
        grid = (cdiv(mean.numel(), FORWARD_ROWS),)
        _layer_norm_fwd_kernel[grid](*pointers, mean.numel(), eps, **_forward_sizes(x.shape[-1]))
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
    grid = (cdiv(mean.numel(), BACKWARD_ROWS),)
    partial = x.new_empty((2 + branch_bias_gradient, *grid, x.shape[-1]), dtype=torch.float32)
    if d_x.numel():
        inputs = d_x_out, d_out.contiguous(), x, *map(tensors.as_float32, (weight, bias)), mean, rstd
        constants = _backward_sizes(x.shape[-1]) | {"BRANCH_BIAS": branch_bias_gradient}
        _layer_norm_bwd_kernel[grid](*inputs, d_x, d_branch, out, partial, mean.numel(), **constants)
    d_weight, d_bias, *d_branch_bias = sum_rows(partial)
    return d_x, d_branch, d_weight, d_bias, *(d_branch_bias or [tensors.empty_bias_gradient(x, False)]), out


def _forward_sizes(d: int) -> dict[str, int]:
    """The two pieces of a row. A warp takes two short rows at once, so that a piece of 128 is read 16 bytes wide."""
    first = max(next_power_of_2(d) // 2, 1)
    second = next_power_of_2(max(d - first, 1))
    each = 2 if d <= 512 else 1
    return {"D": d, "FIRST": first, "SECOND": second, "EACH": each, "FORWARD_ROWS": FORWARD_ROWS, "num_warps": 1}


def _backward_sizes(d: int) -> dict[str, int]:
    """Masked lanes pad a row to a power of two."""
    lanes = next_power_of_2(d)
    warps = 1 if d <= ONE_WARP else min(lanes // (32 * LANES_EACH), 16)
    return {"D": d, "BD": lanes, "BACKWARD_ROWS": BACKWARD_ROWS, "num_warps": warps}
