"""gelu: the exact GELU of an MLP, without its Linears."""

import torch
from torch import Tensor
from torch.nn import functional as F

from unite_fast.kernels import backend, tensors
from unite_fast.kernels.fused_op import Backend, FusedOp, triton_backend
from unite_fast.kernels.registry import register
from unite_fast.kernels.tensors import upcast


def gelu_ref(u: Tensor, u_bias: Tensor | None = None) -> Tensor:
    return F.gelu(tensors.containing(upcast(u), u_bias)).to(u.dtype)


def _fake_forward(u, u_bias):
    return (tensors.empty_like(u),)


def _fake_backward(d_out, u, bias_gradient):
    return tensors.empty_like(u), tensors.empty_bias_gradient(u, bias_gradient)


def _native_forward(u, u_bias):
    """PyTorch's operators, float32 inside."""
    return (F.gelu(u.contiguous()),)


def _native_backward(d_out, u, bias_gradient):
    d_out, u = d_out.contiguous(), u.contiguous()
    if not bias_gradient:
        return torch.ops.aten.gelu_backward(d_out, u), tensors.empty_bias_gradient(u, False)
    d_u = torch.ops.aten.gelu_backward(d_out.float(), u.float())
    return d_u.to(u.dtype), d_u.flatten(0, -2).sum(0)


gelu_op = FusedOp(
    "gelu",
    inputs="Tensor u, Tensor? u_bias",
    fake_forward=_fake_forward,
    backward_inputs="Tensor d_out, Tensor u, bool bias_gradient",
    backward_outputs=2,
    fake_backward=_fake_backward,
    saved=lambda inputs, outputs: (inputs[0], inputs[1] is not None),
    backends={"native": Backend(_native_forward, _native_backward), "triton": triton_backend("gelu", recompute=True)},
)


def gelu(u: Tensor, u_bias: Tensor | None = None) -> Tensor:
    """The exact GELU, u Phi(u) with the distribution function Phi of the normal distribution, in float32. Source:
    Hendrycks and Gimpel, arXiv 1606.08415.

    Args:
        u: [..., M].
        u_bias: [M], the bias that u contains, or None; gets the sum of u's gradient (`linear.shared_bias`).

    Returns:
        [..., M] in u's dtype.

    Raises:
        ValueError: shapes that do not match.
    """
    tensors.check_contained("gelu", "u_bias", u, u_bias)
    chosen = backend.choose(u, op="gelu")
    return gelu_ref(u, u_bias) if chosen == "reference" else gelu_op(chosen, u, u_bias)


def _example(size, new):
    return {
        "u": new(size.batch, size.tokens, size.hidden, dtype=size.other),
        "u_bias": new(size.hidden, dtype=size.weights),
    }


register(gelu, gelu_ref, gelu_op, example=_example)
