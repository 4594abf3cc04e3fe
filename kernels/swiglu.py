"""swiglu: out = silu(u) * w, where u and w are the two halves of the last dimension.

Shapes: uw [..., 2 M] -> [..., M] in uw's dtype; silu and the product are float32.
Source: Shazeer, arXiv 2002.05202.
"""

from torch import Tensor
from torch.nn import functional as F

from unite_fast.kernels import backend, layout, native
from unite_fast.kernels.common import mistake, upcast
from unite_fast.kernels.op import Body, FusedOp, triton_body


def swiglu_ref(uw: Tensor) -> Tensor:
    u, w = upcast(uw).chunk(2, dim=-1)
    return (F.silu(u) * w).to(uw.dtype)


def _like_forward(uw):
    return (uw.new_empty((*uw.shape[:-1], uw.shape[-1] // 2)),)


def _native_forward(uw):
    (out,) = _like_forward(uw)
    uw, width = uw.contiguous(), out.shape[-1]
    rows = out.numel() // width if width else 0
    native.run("swiglu_forward", layout.TYPES[uw.dtype], rows, width, uw.data_ptr(), out.data_ptr())
    return (out,)


def _like_backward(d_out, uw):
    return (layout.room(uw),)


def _native_backward(d_out, uw):
    (d_uw,) = _like_backward(d_out, uw)
    d_out, uw, width = d_out.contiguous(), uw.contiguous(), d_out.shape[-1]
    rows = d_out.numel() // width if width else 0
    pointers = d_out.data_ptr(), uw.data_ptr(), d_uw.data_ptr()
    native.run("swiglu_backward", layout.TYPES[uw.dtype], rows, width, *pointers)
    return (d_uw,)


_fused = FusedOp(
    "swiglu",
    inputs="Tensor uw",
    outputs="Tensor",
    results=1,
    like_forward=_like_forward,
    backward_inputs="Tensor d_out, Tensor uw",
    backward_outputs="Tensor",
    like_backward=_like_backward,
    saved=lambda inputs, outputs: inputs,
    bodies={"native": Body(_native_forward, _native_backward), "triton": triton_body("swiglu", "swiglu", again=True)},
)


def swiglu(uw: Tensor) -> Tensor:
    """Gate the second half by SiLU of the first; see the module's docstring.

    Raises:
        ValueError: an odd last dimension.
    """
    if uw.shape[-1] % 2:
        raise mistake("swiglu", f"the last dimension must be even, got {uw.shape[-1]}")
    body = backend.choose(uw)
    return swiglu_ref(uw) if body == "reference" else _fused(body, uw)
