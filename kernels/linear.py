"""Linears that recompute in backward what is cheap to recompute, instead of saving it.

    op                                            result                                 saved for backward
    linear(x, W, b)                               x W^T + b                              x
    swiglu_linear(uw, W, b)                       linear(swiglu(uw), W, b)               uw
    gelu_linear(u, W, b)                          linear(gelu(u), W, b)                  u
    layer_norm_linear(x, w, v, W, b)              linear(layer_norm(x; w, v), W, b)      x, and mean and rstd per token
    residual_layer_norm_linear(x, branch, ..)     x_out = x + branch, and                x_out, and mean and rstd
                                                  layer_norm_linear(x_out, ..)
    gated_residual_adaln_linear(x, branch, ..)    x_out, h = gated_residual_adaln(..),   x_out, branch and rstd
                                                  returned as x_out, linear(h, W, b)
    linears(x, Ws, bs)                            linear(x, W, b) of each, concatenated  x

Under bfloat16 autocast, matmuls run in bfloat16 with float32 sums; see matmul.py. Otherwise they run in the dtype of
the input, and each op runs as its separate parts and recomputes nothing: small models train in float32 on a CPU, where
more calls would cost more than memory is worth.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from unite_fast.kernels import backend, fused_op, tensors
from unite_fast.kernels.adaln import (
    adaln_inputs,
    adaln_modulate_op,
    check_branch,
    check_modulation,
    gated_residual_adaln,
    gated_residual_adaln_op,
)
from unite_fast.kernels.casts import joined
from unite_fast.kernels.fused_op import Backend, FusedOp, triton_backend
from unite_fast.kernels.matmul import input_gradient, matmul, matmul_backward, weight_gradients
from unite_fast.kernels.registry import New, Size, register
from unite_fast.kernels.swiglu import swiglu, swiglu_op
from unite_fast.kernels.tensors import EPS, argument_error, matmul_dtype


def _fake_matmul(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype or x.dtype)


def _fake_matmul_gradients(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias: always float32, as from `matmul_backward`."""
    return tensors.empty_like(weight, torch.float32), weight.new_empty(weight.shape[0], dtype=torch.float32)


def _activation_linear(name: str, activation: dict[str, Backend]) -> FusedOp:
    """The op linear(f(x), W, b) for an activation f. It saves x and recomputes f(x) in backward."""

    def with_linear(f: Backend) -> Backend:
        def forward(x, weight, bias):
            return (matmul(f.forward(x)[0], weight, bias),)

        def recompute_separately(d_activated, x):
            return f.backward(d_activated, x)[0], f.forward(x)[0]

        def backward(d_y, x, weight):
            d_x, activated = (f.backward_recompute or recompute_separately)(input_gradient(d_y, weight), x)
            return d_x, *weight_gradients(d_y, activated)

        return Backend(forward, backward)

    return FusedOp(
        name,
        fake_forward=lambda x, weight, bias: (_fake_matmul(x, weight),),
        backward_outputs="Tensor, Tensor, Tensor",
        fake_backward=lambda d_y, x, weight: (tensors.empty_like(x), *_fake_matmul_gradients(weight)),
        saved=lambda inputs, outputs: inputs[:2],
        backends={key: with_linear(f) for key, f in activation.items()},
    )


def _on_all_devices(forward, backward) -> dict[str, Backend]:
    """One backend of PyTorch's own operators, for every device."""
    return dict.fromkeys(("native", "triton"), Backend(forward, backward))


linear_op = _activation_linear("linear", _on_all_devices(lambda x: (x,), lambda d, x: (d,)))
swiglu_linear_op = _activation_linear("swiglu_linear", swiglu_op.backends)
gelu_linear_op = _activation_linear(
    "gelu_linear", _on_all_devices(lambda u: (F.gelu(u),), lambda d, u: (torch.ops.aten.gelu_backward(d, u),))
)


def _layer_norm_forward(x, norm_weight, norm_bias, eps, out_dtype):
    weights = tensors.as_float32(norm_weight), tensors.as_float32(norm_bias)
    normed, mean, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], *weights, eps)
    return normed.to(out_dtype), mean, rstd


def _layer_norm_backward(d_normed, x, norm_weight, mean, rstd):
    weight = tensors.as_float32(norm_weight)
    d_x, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        d_normed.float(), x.float(), x.shape[-1:], mean, rstd, weight, weight, (True, True, True)
    )
    return d_x.to(x.dtype), d_weight, d_bias


def _recompute_norm(x, norm_weight, norm_bias, mean, rstd, dtype):
    """LayerNorm of x from its saved mean and rstd."""
    return torch.addcmul(tensors.as_float32(norm_bias), (x - mean) * rstd, tensors.as_float32(norm_weight)).to(dtype)


_LAYER_NORM = {
    "native": Backend(_layer_norm_forward, _layer_norm_backward),
    "triton": triton_backend("layer_norm", "layer_norm", recompute=True),
}
"""forward: (x, weight, bias, eps, out_dtype) -> out, mean, rstd. backward: (d_out, x, weight, mean, rstd) -> gradients
of x, weight and bias."""


def _layer_norm_linear_backend(norm: Backend) -> Backend:
    def forward(x, norm_weight, norm_bias, weight, bias, eps, out_dtype):
        normed, mean, rstd = norm.forward(x, norm_weight, norm_bias, eps, out_dtype)
        return matmul(normed, weight, bias), mean, rstd

    def recompute_separately(d_normed, x, norm_weight, norm_bias, mean, rstd):
        normed = _recompute_norm(x, norm_weight, norm_bias, mean, rstd, d_normed.dtype)
        return *norm.backward(d_normed, x, norm_weight, mean, rstd), normed

    def backward(d_y, x, norm_weight, norm_bias, weight, mean, rstd):
        *gradients, normed = (norm.backward_recompute or recompute_separately)(
            input_gradient(d_y, weight), x, norm_weight, norm_bias, mean, rstd
        )
        return *gradients, *weight_gradients(d_y, normed)

    return Backend(forward, backward)


layer_norm_linear_op = FusedOp(
    "layer_norm_linear",
    inputs="Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias, float eps, "
    "ScalarType out_dtype",
    outputs="Tensor, Tensor, Tensor",
    fake_forward=lambda x, norm_weight, norm_bias, weight, bias, eps, out_dtype: (
        _fake_matmul(x, weight, out_dtype),
        *(x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(2)),
    ),
    backward_inputs="Tensor d_y, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor mean, "
    "Tensor rstd",
    backward_outputs="Tensor, Tensor, Tensor, Tensor, Tensor",
    fake_backward=lambda d_y, x, norm_weight, norm_bias, weight, mean, rstd: (
        tensors.empty_like(x),
        tensors.empty_weight_gradient(norm_weight, x),
        tensors.empty_weight_gradient(norm_bias, x),
        *_fake_matmul_gradients(weight),
    ),
    saved=lambda inputs, outputs: (*inputs[:4], *outputs[1:]),
    backends={name: _layer_norm_linear_backend(norm) for name, norm in _LAYER_NORM.items()},
)


def _residual_forward(x, branch, norm_weight, norm_bias, eps, out_dtype):
    x_out = (x + branch).to(x.dtype)
    return x_out, *_layer_norm_forward(x_out, norm_weight, norm_bias, eps, out_dtype)


def _residual_backward_recompute(d_x_out, d_normed, x_out, branch_dtype, norm_weight, norm_bias, mean, rstd):
    d_x, d_norm_weight, d_norm_bias = _layer_norm_backward(d_normed, x_out, norm_weight, mean, rstd)
    if d_x_out is not None:
        d_x += d_x_out
    normed = _recompute_norm(x_out, norm_weight, norm_bias, mean, rstd, d_normed.dtype)
    # A copy even for equal dtypes: no two results may share memory.
    return d_x, d_x.to(branch_dtype, copy=True), d_norm_weight, d_norm_bias, normed


def _residual_norm_linear_backend(norm: Backend) -> Backend:
    """`norm` has forward (x, branch, weight, bias, eps, out_dtype) -> x_out, out, mean, rstd, and backward_recompute
    (d_x_out, d_out, x_out, dtype of branch, weight, bias, mean, rstd) -> gradients of x, branch, weight and bias, and
    out."""

    def forward(x, branch, norm_weight, norm_bias, weight, bias, eps, out_dtype):
        x_out, normed, mean, rstd = norm.forward(x, branch, norm_weight, norm_bias, eps, out_dtype)
        return x_out, matmul(normed, weight, bias), mean, rstd

    def backward(d_x_out, d_y, x_out, norm_weight, norm_bias, weight, mean, rstd, branch_dtype):
        d_normed = input_gradient(d_y, weight)
        assert norm.backward_recompute is not None
        *gradients, normed = norm.backward_recompute(
            d_x_out, d_normed, x_out, branch_dtype, norm_weight, norm_bias, mean, rstd
        )
        return *gradients, *weight_gradients(d_y, normed)

    return Backend(forward, backward)


residual_layer_norm_linear_op = FusedOp(
    "residual_layer_norm_linear",
    inputs="Tensor x, Tensor branch, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias, float eps, "
    "ScalarType out_dtype",
    outputs="Tensor, Tensor, Tensor, Tensor",
    results=2,
    fake_forward=lambda x, branch, norm_weight, norm_bias, weight, bias, eps, out_dtype: (
        tensors.empty_like(x),
        _fake_matmul(x, weight, out_dtype),
        *(x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(2)),
    ),
    backward_inputs="Tensor? d_x_out, Tensor d_y, Tensor x_out, Tensor norm_weight, Tensor norm_bias, Tensor weight, "
    "Tensor mean, Tensor rstd, ScalarType branch_dtype",
    backward_outputs="Tensor, Tensor, Tensor, Tensor, Tensor, Tensor",
    fake_backward=lambda d_x_out, d_y, x_out, norm_weight, norm_bias, weight, mean, rstd, branch_dtype: (
        tensors.empty_like(x_out),
        tensors.empty_like(x_out, branch_dtype),
        tensors.empty_weight_gradient(norm_weight, x_out),
        tensors.empty_weight_gradient(norm_bias, x_out),
        *_fake_matmul_gradients(weight),
    ),
    saved=lambda inputs, outputs: (outputs[0], *inputs[2:5], *outputs[2:], inputs[1].dtype),
    backends={
        "native": _residual_norm_linear_backend(
            # Only `backward_recompute` is used.
            Backend(_residual_forward, _residual_backward_recompute, backward_recompute=_residual_backward_recompute)
        ),
        "triton": _residual_norm_linear_backend(triton_backend("layer_norm", "residual_layer_norm", recompute=True)),
    },
)


def _gated_linear_backend(gated: Backend, adaln: Backend) -> Backend:
    def forward(x, branch, gate, norm_weight, shift, scale, weight, bias, out_dtype):
        x_out, h, rstd = gated.forward(x, branch, gate, norm_weight, shift, scale, EPS, out_dtype)
        return x_out, matmul(h, weight, bias), rstd

    def recompute_separately(d_x_out, d_h, x_out, branch, gate, norm_weight, shift, scale, rstd):
        gradients = gated.backward(d_x_out, d_h, x_out, branch, gate, norm_weight, scale, rstd)
        return *gradients, adaln.forward(x_out, norm_weight, shift, scale, EPS, d_h.dtype)[0]

    def backward(d_x_out, d_y, x_out, branch, gate, norm_weight, shift, scale, weight, rstd):
        *gradients, h = (gated.backward_recompute or recompute_separately)(
            d_x_out, input_gradient(d_y, weight), x_out, branch, gate, norm_weight, shift, scale, rstd
        )
        return *gradients, *weight_gradients(d_y, h)

    return Backend(forward, backward)


def _fake_gated_linear(x, branch, gate, norm_weight, shift, scale, weight, bias, out_dtype):
    rstd = x.new_empty(x.shape[:2], dtype=torch.float32)
    return tensors.empty_like(x), _fake_matmul(x, weight, out_dtype), rstd


def _fake_gated_linear_backward(d_x_out, d_y, x_out, branch, gate, norm_weight, shift, scale, weight, rstd):
    d_gate, d_shift, d_scale = (tensors.empty_gradient(v) for v in (gate, scale, scale))
    d_norm_weight = tensors.empty_weight_gradient(norm_weight, x_out)
    gradients = tensors.empty_like(x_out), tensors.empty_gradient(branch), d_gate, d_norm_weight, d_shift, d_scale
    return *gradients, *_fake_matmul_gradients(weight)


gated_residual_adaln_linear_op = FusedOp(
    "gated_residual_adaln_linear",
    inputs="Tensor x, Tensor branch, Tensor gate, Tensor norm_weight, Tensor shift, Tensor scale, Tensor weight, "
    "Tensor bias, ScalarType out_dtype",
    outputs="Tensor, Tensor, Tensor",
    results=2,
    fake_forward=_fake_gated_linear,
    backward_inputs="Tensor? d_x_out, Tensor d_y, Tensor x_out, Tensor branch, Tensor gate, Tensor norm_weight, "
    "Tensor shift, Tensor scale, Tensor weight, Tensor rstd",
    backward_outputs="Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor",
    fake_backward=_fake_gated_linear_backward,
    saved=lambda inputs, outputs: (outputs[0], *inputs[1:7], outputs[2]),
    backends={
        key: _gated_linear_backend(gated, adaln_modulate_op.backends[key])
        for key, gated in gated_residual_adaln_op.backends.items()
    },
)


def recomputing_backend(x: Tensor) -> str | None:
    """The backend of an op that recomputes; None if its parts run one by one."""
    dtype = matmul_dtype(x)
    chosen = backend.choose(x, dtype)
    return None if chosen == "reference" or dtype != torch.bfloat16 else chosen


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A Linear, x W^T + b, which saves x in the dtype of the matmul.

    Args:
        x: [B, T, K].
        weight: float32 [N, K].
        bias: float32 [N].

    Returns:
        [B, T, N], bfloat16 under autocast to it, else in the input's dtype; sums are float32.

    Raises:
        ValueError: shapes that do not match.
    """
    _check("linear", x.shape[-1], weight, bias)
    return _run(linear_op, lambda x: x, x, weight, bias)


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
        _check("linears", x.shape[-1], weight, bias)
    # For a compiler and for fake tensors each is an operator of its own.
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
        d_x, d_weights, d_biases = matmul_backward(d_y, x, joined(weights, x.dtype))
        sizes = [len(weight) for weight in weights]
        return d_x, *d_weights.split(sizes), *d_biases.split(sizes)


def swiglu_linear(uw: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The second half of a SwiGLU: linear(swiglu(uw), W, b). Saves uw and recomputes swiglu(uw) in backward. swiglu is
    float32 inside. Source: Shazeer, arXiv 2002.05202.

    Args:
        uw: [B, T, 2 K].
        weight: float32 [N, K].
        bias: float32 [N].

    Returns:
        [B, T, N], bfloat16 under autocast to it, else in the input's dtype; sums are float32.

    Raises:
        ValueError: shapes that do not match.
    """
    _check("swiglu_linear", uw.shape[-1] / 2, weight, bias)
    return _run(swiglu_linear_op, swiglu, uw, weight, bias)


def gelu_linear(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The second half of an MLP with the exact GELU: linear(gelu(u), W, b), gelu(u) = u Phi(u). Saves u and recomputes
    gelu(u) in backward. Source: Hendrycks and Gimpel, arXiv 1606.08415.

    Args:
        u: [B, T, K].
        weight: float32 [N, K].
        bias: float32 [N].

    Returns:
        [B, T, N], bfloat16 under autocast to it, else in the input's dtype; sums are float32.

    Raises:
        ValueError: shapes that do not match.
    """
    _check("gelu_linear", u.shape[-1], weight, bias)
    return _run(gelu_linear_op, F.gelu, u, weight, bias)


def _run(fused: FusedOp, activation: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    chosen = recomputing_backend(x)
    return fused(chosen, x.to(torch.bfloat16), weight, bias) if chosen else F.linear(activation(x), weight, bias)


def layer_norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """A Linear of a LayerNorm over the last dimension. Saves x, mean and rstd, and recomputes the norm in backward.

        linear((x - mean(x)) / sqrt(var(x) + eps) * norm_weight + norm_bias, W, b)

    The norm is float32. Source: Ba et al., arXiv 1607.06450.

    Args:
        x: [B, T, K].
        norm_weight: [K].
        norm_bias: [K].
        weight: float32 [N, K].
        bias: float32 [N].
        eps: added to the variance.

    Returns:
        [B, T, N], bfloat16 under autocast to it, else in the input's dtype; sums are float32.

    Raises:
        ValueError: shapes that do not match.
    """
    _check("layer_norm_linear", x.shape[-1], weight, bias)
    chosen = recomputing_backend(x)
    if not chosen:
        return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias)
    return layer_norm_linear_op(chosen, x, norm_weight, norm_bias, weight, bias, eps, torch.bfloat16)


def residual_layer_norm_linear(
    x: Tensor, branch: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add a branch, then `layer_norm_linear`: x_out = x + branch, and layer_norm_linear(x_out, ..). Saves x_out, mean
    and rstd, and recomputes the norm in backward.

    Args:
        x: [B, T, K], the residual.
        branch: [B, T, K].
        norm_weight: [K].
        norm_bias: [K].
        weight: float32 [N, K].
        bias: float32 [N].
        eps: added to the variance.

    Returns:
        x_out [B, T, K] in x's dtype, and [B, T, N], bfloat16 under autocast to it; norm and sums are float32.

    Raises:
        ValueError: shapes that do not match.
    """
    name = "residual_layer_norm_linear"
    if branch.shape != x.shape:
        raise argument_error(name, f"branch must be {list(x.shape)}, got {list(branch.shape)}")
    _check(name, x.shape[-1], weight, bias)
    chosen = recomputing_backend(x)
    if not chosen:
        x = x + branch
        return x, F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias)
    return residual_layer_norm_linear_op(chosen, x, branch, norm_weight, norm_bias, weight, bias, eps, torch.bfloat16)


def gated_residual_adaln_linear(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """x_out, h = gated_residual_adaln(x, branch, ..), returned as x_out and linear(h, W, b). Saves x_out, branch and
    rstd, and recomputes h in backward.

    Args:
        x: [B, T, K], the residual.
        branch: [B, T, K].
        gate: [B, K].
        norm_weight: [K].
        shift: [B, K].
        scale: [B, K].
        weight: float32 [N, K].
        bias: float32 [N].

    Returns:
        x_out [B, T, K] in x's dtype, and [B, T, N], bfloat16 under autocast to it; all other arithmetic is float32.

    Raises:
        ValueError: shapes that do not match.
    """
    name = "gated_residual_adaln_linear"
    check_modulation(name, x, norm_weight, shift, scale)
    check_branch(name, x, branch, gate)
    _check(name, x.shape[-1], weight, bias)
    inputs, chosen = (x, branch, gate, norm_weight, shift, scale), recomputing_backend(x)
    if not chosen:
        x, h = gated_residual_adaln(*inputs, EPS, matmul_dtype(x))
        return x, F.linear(h, weight, bias)
    return gated_residual_adaln_linear_op(chosen, *inputs, weight, bias, torch.bfloat16)


def _check(name: str, width: float, weight: Tensor, bias: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[1] != width:
        raise argument_error(name, f"weight must be [N, {width:g}], got {list(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise argument_error(name, f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")


def _example(size: Size, new: New, names: str) -> dict:
    """The named inputs of an op of this file; N is the hidden width."""
    b, t, d, n = size.batch, size.tokens, size.width, size.hidden
    inputs = {
        "x": new(b, t, d, dtype=size.residual),
        "u": new(b, t, d, dtype=size.other),
        "uw": new(b, t, 2 * d, dtype=size.other),
        "branch": new(b, t, d, dtype=size.other),
        "norm_weight": new(d, dtype=size.weights, around=1.0),
        "norm_bias": new(d, dtype=size.weights),
        "weight": new(n, d, dtype=size.weights),
        "bias": new(n, dtype=size.weights),
    }
    inputs |= adaln_inputs(size, new, "gate shift scale")
    return {name: inputs[name] for name in names.split()}


def _register(function: Callable, fused: FusedOp, names: str, **constants) -> None:
    """`constants` are the arguments without a gradient. `fused` takes the same arguments, and the dtype of the matmul
    where its schema has one."""
    register(
        function,
        None,
        fused,
        example=lambda size, new: _example(size, new, names) | constants,
        part="composed",
        op_inputs=lambda **example: (*example.values(), torch.bfloat16)[: len(fused.op._schema.arguments)],
    )


_register(linear, linear_op, "x weight bias")
_register(swiglu_linear, swiglu_linear_op, "uw weight bias")
_register(gelu_linear, gelu_linear_op, "u weight bias")
_register(layer_norm_linear, layer_norm_linear_op, "x norm_weight norm_bias weight bias", eps=1e-6)
_register(
    residual_layer_norm_linear,
    residual_layer_norm_linear_op,
    "x branch norm_weight norm_bias weight bias",
    eps=1e-6,
)
_register(
    gated_residual_adaln_linear,
    gated_residual_adaln_linear_op,
    "x branch gate norm_weight shift scale weight bias",
)
