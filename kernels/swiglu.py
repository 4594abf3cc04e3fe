"""swiglu: the gate of a SwiGLU, without its Linears."""

from torch import Tensor
from torch.nn import functional as F

from unite_fast.kernels import backend, native, tensors
from unite_fast.kernels.fused_op import Backend, FusedOp, triton_backend
from unite_fast.kernels.registry import register
from unite_fast.kernels.tensors import argument_error, upcast


def swiglu_ref(uw: Tensor, uw_bias: Tensor | None = None) -> Tensor:
    u, w = tensors.containing(upcast(uw), uw_bias).chunk(2, dim=-1)
    return (F.silu(u) * w).to(uw.dtype)


def _fake_forward(uw, uw_bias):
    return (uw.new_empty((*uw.shape[:-1], uw.shape[-1] // 2)),)


def _native_forward(uw, uw_bias):
    (out,) = _fake_forward(uw, uw_bias)
    uw, width = uw.contiguous(), out.shape[-1]
    rows = out.numel() // width if width else 0
    native.run("swiglu_forward", tensors.DTYPES[uw.dtype], rows, width, uw.data_ptr(), out.data_ptr())
    return (out,)


def _fake_backward(d_out, uw, bias_gradient):
    return tensors.empty_like(uw), tensors.empty_bias_gradient(uw, bias_gradient)


def _native_backward(d_out, uw, bias_gradient):
    if bias_gradient:
        # In float32, so that the sum is of unrounded numbers. On a CPU, the model does not ask for it.
        d_uw = _native_backward(d_out.float(), uw.float(), False)[0]
        return d_uw.to(uw.dtype), d_uw.flatten(0, -2).sum(0)
    d_uw, no_bias = _fake_backward(d_out, uw, False)
    d_out, uw, width = d_out.contiguous(), uw.contiguous(), d_out.shape[-1]
    rows = d_out.numel() // width if width else 0
    pointers = d_out.data_ptr(), uw.data_ptr(), d_uw.data_ptr()
    native.run("swiglu_backward", tensors.DTYPES[uw.dtype], rows, width, *pointers)
    return d_uw, no_bias


swiglu_op = FusedOp(
    "swiglu",
    inputs="Tensor uw, Tensor? uw_bias",
    fake_forward=_fake_forward,
    backward_inputs="Tensor d_out, Tensor uw, bool bias_gradient",
    backward_outputs=2,
    fake_backward=_fake_backward,
    saved=lambda inputs, outputs: (inputs[0], inputs[1] is not None),
    backends={
        "native": Backend(_native_forward, _native_backward),
        "triton": triton_backend("swiglu", recompute=True),
    },
)


def swiglu(uw: Tensor, uw_bias: Tensor | None = None) -> Tensor:
    """SiLU of the first half of the last dimension, times the second half.

        out = silu(u) * w,   u, w = uw.chunk(2, dim=-1)

    silu and the product are float32. Source: Shazeer, arXiv 2002.05202.

    Args:
        uw: [..., 2 M].
        uw_bias: [2 M], the bias that uw contains, or None; gets the sum of uw's gradient (`linear.shared_bias`).

    Returns:
        [..., M] in uw's dtype.

    Raises:
        ValueError: an odd last dimension, or shapes that do not match.
    """
    if uw.shape[-1] % 2:
        raise argument_error("swiglu", f"the last dimension must be even, got {uw.shape[-1]}")
    tensors.check_contained("swiglu", "uw_bias", uw, uw_bias)
    chosen = backend.choose(uw, op="swiglu")
    return swiglu_ref(uw, uw_bias) if chosen == "reference" else swiglu_op(chosen, uw, uw_bias)


def _example(size, new):
    hidden = 2 * size.hidden
    return {"uw": new(size.batch, size.tokens, hidden, dtype=size.other), "uw_bias": new(hidden, dtype=size.weights)}


register(swiglu, swiglu_ref, swiglu_op, example=_example)
