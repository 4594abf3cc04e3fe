"""bias_relu: bias and ReLU of a convolution without bias. It has no C++ backend: on a CPU, PyTorch's convolution adds
the bias, and ReLU runs in place."""

import torch
from torch import Tensor

from unite_fast.kernels import backend
from unite_fast.kernels.fused_op import FusedOp, triton_backend
from unite_fast.kernels.registry import register
from unite_fast.kernels.tensors import argument_error, empty_channels_last, upcast


def bias_relu_ref(x: Tensor, bias: Tensor) -> Tensor:
    return torch.relu(upcast(x) + upcast(bias)[:, None, None]).to(x.dtype)


bias_relu_op = FusedOp(
    "bias_relu",
    fake_forward=lambda x, bias: (empty_channels_last(x, *x.shape[2:]),),
    backward_outputs=1,
    fake_backward=lambda d_out, out: (empty_channels_last(out, *out.shape[2:]),),
    saved=lambda inputs, outputs: outputs,
    backends={"triton": triton_backend("bias_relu")},
)


def bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    """relu(x + bias), in float32: x [B, C, H, W], bias [C] -> [B, C, H, W] in x's dtype.

    The gradient of x is the result's where the result is above 0 (or NaN), else 0. Only the result is saved for it. The
    bias gets no gradient.

    Raises:
        ValueError: shapes that do not match, or a bias that requires a gradient.
    """
    if x.dim() != 4 or bias.shape != x.shape[1:2]:
        raise argument_error("bias_relu", f"x {list(x.shape)} must be [B, C, H, W] and bias {list(bias.shape)} [C]")
    if bias.requires_grad:
        raise argument_error("bias_relu", "bias gets no gradient; detach it")
    # This op has no C++, so on a CPU the backend "native" runs the reference too.
    chosen = backend.choose(x) if x.is_cuda or backend.current() == "triton" else "reference"
    return bias_relu_ref(x, bias) if chosen == "reference" else bias_relu_op(chosen, x, bias)


def _example(size, new):
    x = new(size.batch, size.width, size.tokens, 1, dtype=size.other).to(memory_format=torch.channels_last)
    return {"x": x, "bias": new(size.width, dtype=size.weights)}


register(bias_relu, bias_relu_ref, bias_relu_op, example=_example, part="lpips")
