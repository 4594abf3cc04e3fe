"""gelu on CUDA: out = u Phi(u), with the distribution function Phi of the normal distribution, for u [..., M].

The kernels are laid out as those of swiglu.py. float32 inside. If M is a multiple of 8 (float32: 4), all accesses are
16 bytes wide."""

import triton
import triton.language as tl
from torch import Tensor

from unite_fast.kernels import tensors
from unite_fast.kernels.triton_kernels.rows import cdiv, load
from unite_fast.kernels.triton_kernels.sums import bias_partial, sum_bias

BLOCK = 1024
"""Elements per program: 8 per thread, one access of 16 bytes in bfloat16 for each of u and out."""
ROWS, COLUMNS, TOKENS = 4, 256, 64
"""The same in a tile of the backward kernel; its partial sums cost an eighth of a byte per element."""


@triton.jit
def _distribution(b_u):
    """Phi(u)."""
    return 0.5 * (1.0 + tl.erf(b_u * 0.7071067811865476))


@triton.jit
def _gelu_fwd_kernel(u, out, elements, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < elements
    b_u = load(u, o, m)
    tl.store(out + o, (b_u * _distribution(b_u)).to(out.dtype.element_ty), mask=m)


@triton.jit
def _gelu_bwd_kernel(
    d_out,
    u,
    d_u,
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
    b_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i_row in range(i_chunk * TOKENS, tl.minimum((i_chunk + 1) * TOKENS, rows), ROWS):
        o_row = i_row + tl.arange(0, ROWS)
        m = (o_row < rows)[:, None] & m_column[None, :]
        o = o_row[:, None] * M + o_column[None, :]
        b_u = load(u, o, m)
        b_g = load(d_out, o, m)
        b_phi = _distribution(b_u)
        # d/du u Phi(u) = Phi(u) + u exp(-u^2 / 2) / sqrt(2 pi)
        b_d_u = b_g * (b_phi + b_u * (0.3989422804014327 * tl.exp(-0.5 * b_u * b_u)))
        tl.store(d_u + o, b_d_u.to(d_u.dtype.element_ty), mask=m)
        if out is not None:
            tl.store(out + o, (b_u * b_phi).to(out.dtype.element_ty), mask=m)
        if partial is not None:
            b_sum += b_d_u
    if partial is not None:
        tl.store(partial + i_chunk * M + o_column, tl.sum(b_sum, axis=0), mask=m_column)


def gelu_forward(u: Tensor, u_bias: Tensor | None) -> tuple[Tensor]:
    """u [..., M] -> (out like u,)."""
    out = tensors.empty_like(u)
    if out.numel():
        _gelu_fwd_kernel[(cdiv(out.numel(), BLOCK),)](u.contiguous(), out, out.numel(), BLOCK=BLOCK)
    return (out,)


def gelu_backward(d_out: Tensor, u: Tensor, bias_gradient: bool) -> tuple[Tensor, Tensor]:
    """d_out and u [..., M] -> d_u like u, and its sum [M] float32, empty unless `bias_gradient`."""
    return _backward(d_out, u, None, bias_gradient)


def gelu_backward_recompute(d_out: Tensor, u: Tensor, bias_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """gelu_backward that also recomputes the result -> d_u, its sum, out."""
    out = tensors.empty_like(u)
    return *_backward(d_out, u, out, bias_gradient), out


def _backward(d_out: Tensor, u: Tensor, out: Tensor | None, bias_gradient: bool) -> tuple[Tensor, Tensor]:
    d_u, width, rows = tensors.empty_like(u), u.shape[-1], u.shape[:-1].numel()
    grid = cdiv(width, COLUMNS), cdiv(rows, TOKENS)
    partial = bias_partial(u, grid[1], bias_gradient)
    if u.numel():
        pointers = d_out.contiguous(), u.contiguous(), d_u, out, partial
        _gelu_bwd_kernel[grid](*pointers, rows, M=width, ROWS=ROWS, COLUMNS=COLUMNS, TOKENS=TOKENS)
    return d_u, sum_bias(partial, u)
