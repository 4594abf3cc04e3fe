"""swiglu on CUDA: out = silu(u) * w, where u and w are the two halves of each row of uw [..., 2 M].

Elements of the result are numbered across all rows, so that no width leaves threads idle; a program processes BLOCK of
them. float32 inside. If M is a multiple of 8 (float32: 4), all accesses are 16 bytes wide. For an M of 2730 they would
be 4 bytes wide, so the model pads it to 2752."""

import triton
import triton.language as tl
from torch import Tensor

from unite_fast.kernels import tensors
from unite_fast.kernels.triton_kernels.rows import cdiv, load

BLOCK = 1024
"""Elements per program: 8 per thread, one access of 16 bytes in bfloat16 for each of u, w and out."""


@triton.jit
def _element(BLOCK: tl.constexpr):
    return tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _swiglu_fwd_kernel(uw, out, elements, M: tl.constexpr, BLOCK: tl.constexpr):
    o = _element(BLOCK)
    m = o < elements
    o_u = o // M * (2 * M) + o % M
    b_u = load(uw, o_u, m)
    b_w = load(uw, o_u + M, m)
    b_out = b_u / (1.0 + tl.exp(-b_u)) * b_w
    tl.store(out + o, b_out.to(out.dtype.element_ty), mask=m)


@triton.jit
def _swiglu_bwd_kernel(d_out, uw, d_uw, out, elements, M: tl.constexpr, BLOCK: tl.constexpr):
    o = _element(BLOCK)
    m = o < elements
    o_u = o // M * (2 * M) + o % M
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


def swiglu_forward(uw: Tensor) -> tuple[Tensor]:
    """uw [..., 2 M] -> (out [..., M] in uw's dtype,)."""
    width = uw.shape[-1] // 2
    out = uw.new_empty((*uw.shape[:-1], width))
    if out.numel():
        _swiglu_fwd_kernel[_grid(out)](uw.contiguous(), out, out.numel(), M=width, BLOCK=BLOCK)
    return (out,)


def swiglu_backward(d_out: Tensor, uw: Tensor) -> tuple[Tensor]:
    """d_out [..., M], uw [..., 2 M] -> (d_uw like uw,)."""
    return (_backward(d_out, uw, None),)


def swiglu_backward_recompute(d_out: Tensor, uw: Tensor) -> tuple[Tensor, Tensor]:
    """swiglu_backward that also recomputes the result -> d_uw, out."""
    out = uw.new_empty(d_out.shape)
    return _backward(d_out, uw, out), out


def _backward(d_out: Tensor, uw: Tensor, out: Tensor | None) -> Tensor:
    d_uw = tensors.empty_like(uw)
    if d_out.numel():
        pointers = d_out.contiguous(), uw.contiguous(), d_uw, out
        _swiglu_bwd_kernel[_grid(d_out)](*pointers, d_out.numel(), M=d_out.shape[-1], BLOCK=BLOCK)
    return d_uw


def _grid(out: Tensor) -> tuple[int]:
    return (cdiv(out.numel(), BLOCK),)
