"""swiglu: the gate of a SwiGLU, without its Linears."""

from torch import Tensor
from torch.nn import functional as F

from unite_fast.kernels import backend, native, tensors
from unite_fast.kernels.fused_op import Backend, FusedOp, triton_backend
from unite_fast.kernels.registry import register
from unite_fast.kernels.tensors import argument_error, upcast


def swiglu_ref(uw: Tensor) -> Tensor:
    u, w = upcast(uw).chunk(2, dim=-1)
    return (F.silu(u) * w).to(uw.dtype)


def _fake_forward(uw):
    return (uw.new_empty((*uw.shape[:-1], uw.shape[-1] // 2)),)


def _native_forward(uw):
    (out,) = _fake_forward(uw)
    uw, width = uw.contiguous(), out.shape[-1]
    rows = out.numel() // width if width else 0
    native.run("swiglu_forward", tensors.DTYPES[uw.dtype], rows, width, uw.data_ptr(), out.data_ptr())
    return (out,)


def _fake_backward(d_out, uw):
    return (tensors.empty_like(uw),)


def _native_backward(d_out, uw):
    (d_uw,) = _fake_backward(d_out, uw)
    d_out, uw, width = d_out.contiguous(), uw.contiguous(), d_out.shape[-1]
    rows = d_out.numel() // width if width else 0
    pointers = d_out.data_ptr(), uw.data_ptr(), d_uw.data_ptr()
    native.run("swiglu_backward", tensors.DTYPES[uw.dtype], rows, width, *pointers)
    return (d_uw,)


swiglu_op = FusedOp(
    "swiglu",
    fake_forward=_fake_forward,
    backward_outputs=1,
    fake_backward=_fake_backward,
    saved=lambda inputs, outputs: inputs,
    backends={
        "native": Backend(_native_forward, _native_backward),
        "triton": triton_backend("swiglu", recompute=True),
    },
)


def swiglu(uw: Tensor) -> Tensor:
    """SiLU of the first half of the last dimension, times the second half.

        out = silu(u) * w,   u, w = uw.chunk(2, dim=-1)

    silu and the product are float32. Source: Shazeer, arXiv 2002.05202.

    Args:
        uw: [..., 2 M].

    Returns:
        [..., M] in uw's dtype.

    Raises:
        ValueError: an odd last dimension.
    """
    if uw.shape[-1] % 2:
        raise argument_error("swiglu", f"the last dimension must be even, got {uw.shape[-1]}")
    chosen = backend.choose(uw, op="swiglu")
    return swiglu_ref(uw) if chosen == "reference" else swiglu_op(chosen, uw)


def _example(size, new):
    return {"uw": new(size.batch, size.tokens, 2 * size.hidden, dtype=size.other)}


register(swiglu, swiglu_ref, swiglu_op, example=_example)
