"""swiglu on CUDA: out = silu(u) * w, where u and w are the two halves of each row of uw [..., 2 M].

In the forward kernel, elements of the result are numbered across all rows, so that no width leaves threads idle; a
program processes BLOCK of them. A program of the backward kernel processes `COLUMNS` columns of `TOKENS` rows, `ROWS`
rows at a time, a row per warp, and adds up the gradients of its columns: the gradient of the bias that uw contains. Its
sums are added in a fixed order. float32 inside. If M is a multiple of 8 (float32: 4), all accesses are 16 bytes wide.
For an M of 2730 they would be 4 bytes wide, so the model pads it to 2752."""

import triton
import triton.language as tl
from torch import Tensor

from unite_fast.kernels import tensors
from unite_fast.kernels.triton_kernels.rows import cdiv, load
from unite_fast.kernels.triton_kernels.sums import bias_partial, sum_bias

BLOCK = 1024
"""Elements per program: 8 per thread, one access of 16 bytes in bfloat16 for each of u, w and out."""
ROWS, COLUMNS, TOKENS = 4, 256, 64
"""The same in a tile of the backward kernel; its partial sums cost a quarter of a byte per element of the result."""


@triton.jit
def _swiglu_fwd_kernel(uw, out, elements, M: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < elements
    o_u = o // M * (2 * M) + o % M
    b_u = load(uw, o_u, m)
    b_w = load(uw, o_u + M, m)
    b_out = b_u / (1.0 + tl.exp(-b_u)) * b_w
    tl.store(out + o, b_out.to(out.dtype.element_ty), mask=m)


@triton.jit
def _swiglu_bwd_kernel(
    d_out,
    uw,
    d_uw,
    out,
    partial,
    rows,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    i_chunk = tl.program_id(1).to(tl.int64)
    o_column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m_column = o_column < M
    b_sum_u = tl.zeros((ROWS, COLUMNS), tl.float32)
    b_sum_w = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i_row in range(i_chunk * TOKENS, tl.minimum((i_chunk + 1) * TOKENS, rows), ROWS):
        o_row = i_row + tl.arange(0, ROWS)
        m = (o_row < rows)[:, None] & m_column[None, :]
        o = o_row[:, None] * M + o_column[None, :]
        o_u = o_row[:, None] * (2 * M) + o_column[None, :]
        b_u = load(uw, o_u, m)
        b_w = load(uw, o_u + M, m)
        b_g = load(d_out, o, m)
        b_gate = 1.0 / (1.0 + tl.exp(-b_u))
        b_d_u = b_g * b_w * b_gate * (1.0 + b_u * (1.0 - b_gate))
        b_d_w = b_g * b_u * b_gate
        tl.store(d_uw + o_u, b_d_u.to(d_uw.dtype.element_ty), mask=m)
        tl.store(d_uw + o_u + M, b_d_w.to(d_uw.dtype.element_ty), mask=m)
        if out is not None:
            b_out = b_u / (1.0 + tl.exp(-b_u)) * b_w
            tl.store(out + o, b_out.to(out.dtype.element_ty), mask=m)
        if partial is not None:
            b_sum_u += b_d_u
            b_sum_w += b_d_w
    if partial is not None:
        p_partial = partial + i_chunk * (2 * M) + o_column
        tl.store(p_partial, tl.sum(b_sum_u, axis=0), mask=m_column)
        tl.store(p_partial + M, tl.sum(b_sum_w, axis=0), mask=m_column)


def swiglu_forward(uw: Tensor, uw_bias: Tensor | None) -> tuple[Tensor]:
    """uw [..., 2 M] -> (out [..., M] in uw's dtype,)."""
    width = uw.shape[-1] // 2
    out = uw.new_empty((*uw.shape[:-1], width))
    if out.numel():
        grid = (cdiv(out.numel(), BLOCK),)
        _swiglu_fwd_kernel[grid](uw.contiguous(), out, out.numel(), M=width, BLOCK=BLOCK)
    return (out,)


def swiglu_backward(d_out: Tensor, uw: Tensor, bias_gradient: bool) -> tuple[Tensor, Tensor]:
    """d_out [..., M], uw [..., 2 M] -> d_uw like uw, and its sum [2 M] float32, empty unless `bias_gradient`."""
    return _backward(d_out, uw, None, bias_gradient)


def swiglu_backward_recompute(d_out: Tensor, uw: Tensor, bias_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """swiglu_backward that also recomputes the result -> d_uw, its sum, out."""
    out = uw.new_empty(d_out.shape)
    return *_backward(d_out, uw, out, bias_gradient), out


def _backward(d_out: Tensor, uw: Tensor, out: Tensor | None, bias_gradient: bool) -> tuple[Tensor, Tensor]:
    d_uw, width = tensors.empty_like(uw), d_out.shape[-1]
    rows = d_out.shape[:-1].numel()
    grid = cdiv(width, COLUMNS), cdiv(rows, TOKENS)
    partial = bias_partial(uw, grid[1], bias_gradient)
    if d_out.numel():
        pointers = d_out.contiguous(), uw.contiguous(), d_uw, out, partial
        _swiglu_bwd_kernel[grid](*pointers, rows, M=width, ROWS=ROWS, COLUMNS=COLUMNS, TOKENS=TOKENS)
    return d_uw, sum_bias(partial, uw)
