"""Linears that recompute in backward what is cheap to recompute, instead of saving it.

    op                         result                                   saved for backward
    linear(x, W, b)            x W^T + b                                x
    linears(x, Ws, bs)         linear(x, W, b) of each, concatenated    x
    swiglu_linear(uw, W, b)    linear(swiglu(uw), W, b)                 uw
    gelu_linear(u, W, b)       linear(gelu(u), W, b)                    u

norm_linear.py has those that begin with a norm. `shared_bias` leaves the gradient of a bias to the op that reads the
Linear's result.

Under bfloat16 autocast, matmuls run in bfloat16 with float32 sums, or some of them in float8; see matmul.py. Otherwise
they run in the dtype of the input, and each op runs as its separate parts and recomputes nothing: small models train in
float32 on a CPU, where the extra calls would cost more time than the saved memory is worth.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from unite_fast.kernels import backend, fused_op, tensors
from unite_fast.kernels.casts import joined
from unite_fast.kernels.float8 import runs_in_float8
from unite_fast.kernels.fused_op import Backend, FusedOp
from unite_fast.kernels.gelu import gelu_op, gelu_ref
from unite_fast.kernels.matmul import (
    fake_matmul,
    fake_weight_gradients,
    input_gradient,
    matmul,
    matmul_backward,
    weight_gradients,
)
from unite_fast.kernels.registry import New, Size, register
from unite_fast.kernels.swiglu import swiglu, swiglu_op
from unite_fast.kernels.tensors import argument_error, matmul_dtype


def _linear_forward(x, weight, bias, in_float8):
    return (matmul(x, weight, bias, in_float8),)


linear_op = FusedOp(
    "linear",
    inputs="Tensor x, Tensor weight, Tensor bias, bool in_float8",
    fake_forward=lambda x, weight, bias, in_float8: (fake_matmul(x, weight),),
    backward_inputs="Tensor d_y, Tensor x, Tensor weight, bool bias_gradient, bool in_float8",
    backward_outputs=3,
    fake_backward=lambda d_y, x, weight, bias_gradient, in_float8: (
        tensors.empty_like(x),
        *fake_weight_gradients(weight, bias_gradient),
    ),
    saved=lambda inputs, outputs: (*inputs[:2], inputs[2].requires_grad, inputs[3]),
    # PyTorch's operators, on every device.
    backends=dict.fromkeys(("native", "triton"), Backend(_linear_forward, matmul_backward)),
)


def _activation_linear(activation: FusedOp) -> FusedOp:
    """The op linear(f(x), W, b) for an activation f. It saves x and recomputes f(x) in backward."""

    def with_linear(f: Backend) -> Backend:
        def forward(x, weight, bias, x_bias, in_float8):
            return (matmul(f.forward(x, x_bias)[0], weight, bias, in_float8),)

        def recompute_separately(d_activated, x, x_bias_gradient):
            return *f.backward(d_activated, x, x_bias_gradient), f.forward(x, None)[0]

        def backward(d_y, x, weight, bias_gradient, x_bias_gradient, in_float8):
            recompute = f.backward_recompute or recompute_separately
            d_x, d_x_bias, activated = recompute(input_gradient(d_y, weight, in_float8), x, x_bias_gradient)
            return d_x, *weight_gradients(d_y, activated, bias_gradient), d_x_bias

        return Backend(forward, backward)

    return FusedOp(
        f"{activation.name}_linear",
        inputs="Tensor x, Tensor weight, Tensor bias, Tensor? x_bias, bool in_float8",
        fake_forward=lambda x, weight, bias, x_bias, in_float8: (fake_matmul(x, weight),),
        backward_inputs="Tensor d_y, Tensor x, Tensor weight, bool bias_gradient, bool x_bias_gradient, bool in_float8",
        backward_outputs=4,
        fake_backward=lambda d_y, x, weight, bias_gradient, x_bias_gradient, in_float8: (
            tensors.empty_like(x),
            *fake_weight_gradients(weight, bias_gradient),
            tensors.empty_bias_gradient(x, x_bias_gradient),
        ),
        saved=lambda inputs, outputs: (*inputs[:2], inputs[2].requires_grad, inputs[3] is not None, inputs[4]),
        backends={key: with_linear(f) for key, f in activation.backends.items()},
    )


swiglu_linear_op, gelu_linear_op = _activation_linear(swiglu_op), _activation_linear(gelu_op)


def recomputing_backend(x: Tensor, part: str = "") -> str | None:
    """The backend of an op that recomputes; None if its parts run one by one. `part` is the op beside the Linear."""
    dtype = matmul_dtype(x)
    chosen = backend.choose(x, dtype, part)
    return None if chosen == "reference" or dtype != torch.bfloat16 else chosen


def shared_bias(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
    """The bias to pass to the Linear of x, and the one to pass to the op that reads the Linear's result.

    On a GPU the second is the bias: the reader makes the gradient of the result and sums it in the same kernel, so that
    no kernel reads it a second time. The first then needs no gradient. Elsewhere the Linear sums, and the second is
    None. Plain PyTorch reads the result as `tensors.containing(tensors.upcast(result), second)`.
    """
    return (bias.detach(), bias) if recomputing_backend(x) == "triton" else (bias, None)


def unfused_linear(x: Tensor, weight: Tensor, bias: Tensor, in_float8: bool) -> Tensor:
    """The Linear of an op that runs as its separate parts. float8 has no other implementation than our op."""
    return linear_op("native", x.to(torch.bfloat16), weight, bias, True) if in_float8 else F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor, wide: bool = False) -> Tensor:
    """A Linear, x W^T + b, which saves x in the dtype of the matmul.

    Args:
        x: [B, T, K].
        weight: float32 [N, K].
        bias: float32 [N].
        wide: whether it runs in float8 within `float8.float8_matmuls`.

    Returns:
        [B, T, N], bfloat16 under autocast to it, else in the input's dtype; sums are float32.

    Raises:
        ValueError: shapes that do not match.
    """
    check_weight("linear", x.shape[-1], weight, bias)
    chosen, in_float8 = recomputing_backend(x), runs_in_float8(wide)
    if not chosen:
        return unfused_linear(x, weight, bias, in_float8)
    return linear_op(chosen, x.to(torch.bfloat16), weight, bias, in_float8)


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Several Linears of one input as one matmul: x W_i^T + b_i, concatenated over i.

    Args:
        x: [B, K].
        weights: float32 [N_i, K] each.
        biases: float32 [N_i] each.

    Returns:
        [B, sum of N_i], bfloat16 under autocast to it, else in x's dtype; sums are float32.

    Raises:
        ValueError: shapes that do not match.
    """
    for weight, bias in zip(weights, biases, strict=True):
        check_weight("linears", x.shape[-1], weight, bias)
    # Under torch.compile and with fake tensors, each Linear is a separate operator.
    if not recomputing_backend(x) or torch.compiler.is_compiling() or fused_op.needs_dispatcher(x):
        return torch.cat([linear(x, *each) for each in zip(weights, biases, strict=True)], dim=-1)
    return _Linears.apply(x.to(torch.bfloat16), *weights, *biases)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        half = len(parameters) // 2
        ctx.save_for_backward(x, *parameters[:half])
        with torch.autocast(x.device.type, enabled=False):
            return matmul(x, joined(parameters[:half], x.dtype), joined(parameters[half:], x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        x, *weights = ctx.saved_tensors
        d_x, d_weights, d_biases = matmul_backward(d_y, x, joined(weights, x.dtype), True)
        sizes = [len(weight) for weight in weights]
        return d_x, *d_weights.split(sizes), *d_biases.split(sizes)


def swiglu_linear(
    uw: Tensor, weight: Tensor, bias: Tensor, uw_bias: Tensor | None = None, wide: bool = False
) -> Tensor:
    """The second half of a SwiGLU: linear(swiglu(uw), W, b). Saves uw and recomputes swiglu(uw) in backward. swiglu is
    float32 inside. Source: Shazeer, arXiv 2002.05202.

    Args:
        uw: [B, T, 2 K].
        weight: float32 [N, K].
        bias: float32 [N].
        uw_bias: float32 [2 K], the bias that uw contains, or None; gets the sum of uw's gradient (`shared_bias`).
        wide: see `linear`.

    Returns:
        [B, T, N], bfloat16 under autocast to it, else in the input's dtype; sums are float32.

    Raises:
        ValueError: shapes that do not match.
    """
    tensors.check_contained("swiglu_linear", "uw_bias", uw, uw_bias)
    check_weight("swiglu_linear", uw.shape[-1] / 2, weight, bias)
    return _run(swiglu_linear_op, swiglu, uw, weight, bias, uw_bias, wide)


def gelu_linear(u: Tensor, weight: Tensor, bias: Tensor, u_bias: Tensor | None = None, wide: bool = False) -> Tensor:
    """The second half of an MLP with the exact GELU: linear(gelu(u), W, b), gelu(u) = u Phi(u). Saves u and recomputes
    gelu(u) in backward. Source: Hendrycks and Gimpel, arXiv 1606.08415.

    Args:
        u: [B, T, K].
        weight: float32 [N, K].
        bias: float32 [N].
        u_bias: float32 [K], the bias that u contains, or None; gets the sum of u's gradient (`shared_bias`).
        wide: see `linear`.

    Returns:
        [B, T, N], bfloat16 under autocast to it, else in the input's dtype; sums are float32.

    Raises:
        ValueError: shapes that do not match.
    """
    tensors.check_contained("gelu_linear", "u_bias", u, u_bias)
    check_weight("gelu_linear", u.shape[-1], weight, bias)
    return _run(gelu_linear_op, gelu_ref, u, weight, bias, u_bias, wide)


def _run(
    fused: FusedOp,
    activation: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    wide: bool,
) -> Tensor:
    chosen, in_float8 = recomputing_backend(x, fused.name.removesuffix("_linear")), runs_in_float8(wide)
    if not chosen:
        return unfused_linear(activation(x, x_bias), weight, bias, in_float8)
    return fused(chosen, x.to(torch.bfloat16), weight, bias, x_bias, in_float8)


def check_weight(name: str, width: float, weight: Tensor, bias: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[1] != width:
        raise argument_error(name, f"weight must be [N, {width:g}], got {list(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise argument_error(name, f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")


def register_linear(
    function: Callable, fused: FusedOp, example: Callable[[Size, New], dict], contains: str = "", **constants
) -> None:
    """`register` for an op with a Linear from width to hidden width. `example` makes the arguments before weight and
    bias. After them come the bias that the argument `contains` contains, if it is given, and `constants`. `fused`
    takes the same arguments, whether to run in float8, and the matmul's dtype if its schema has one."""

    def with_linear(size: Size, new: New) -> dict:
        weight, bias = new(size.hidden, size.width, dtype=size.weights), new(size.hidden, dtype=size.weights)
        arguments = {**example(size, new), "weight": weight, "bias": bias}
        if contains:
            arguments[f"{contains}_bias"] = new(arguments[contains].shape[-1], dtype=size.weights)
        return arguments | constants

    register(
        function,
        None,
        fused,
        example=with_linear,
        part="composed",
        op_inputs=lambda **example: (*example.values(), False, torch.bfloat16)[: len(fused.op._schema.arguments)],
    )


register_linear(
    linear, linear_op, lambda size, new: {"x": new(size.batch, size.tokens, size.width, dtype=size.residual)}
)
register_linear(
    swiglu_linear,
    swiglu_linear_op,
    lambda size, new: {"uw": new(size.batch, size.tokens, 2 * size.width, dtype=size.other)},
    contains="uw",
)
register_linear(
    gelu_linear,
    gelu_linear_op,
    lambda size, new: {"u": new(size.batch, size.tokens, size.width, dtype=size.other)},
    contains="u",
)
