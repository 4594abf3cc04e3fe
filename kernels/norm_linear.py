"""Linears that begin with a norm, and recompute it in backward instead of saving its result.

    op                                            result                                   saved for backward
    layer_norm_linear(x, w, v, W, b)              linear(layer_norm(x; w, v), W, b)        x, mean and rstd per token
    residual_layer_norm_linear(x, branch, ..)     x_out = x + branch and                   x_out, mean and rstd
                                                  layer_norm_linear(x_out, ..)
    gated_residual_adaln_linear(x, branch, ..)    x_out and linear(h, W, b), where         x_out, branch and rstd
                                                  x_out, h = gated_residual_adaln(..)

linear.py says when they recompute, and in which dtype the matmuls run.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from unite_fast.kernels import tensors
from unite_fast.kernels.adaln import (
    adaln_inputs,
    adaln_modulate_op,
    check_branch,
    check_modulation,
    gated_residual_adaln,
    gated_residual_adaln_op,
)
from unite_fast.kernels.float8 import runs_in_float8
from unite_fast.kernels.fused_op import Backend, FusedOp, triton_function
from unite_fast.kernels.linear import check_weight, recomputing_backend, register_linear, unfused_linear
from unite_fast.kernels.matmul import fake_matmul, fake_weight_gradients, input_gradient, matmul, weight_gradients
from unite_fast.kernels.tensors import EPS, argument_error, matmul_dtype


def _layer_norm_forward(x, norm_weight, norm_bias, eps, out_dtype):
    weights = tensors.as_float32(norm_weight), tensors.as_float32(norm_bias)
    normed, mean, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], *weights, eps)
    return normed.to(out_dtype), mean, rstd


def _layer_norm_backward_recompute(d_normed, x, norm_weight, norm_bias, mean, rstd):
    weight, bias = tensors.as_float32(norm_weight), tensors.as_float32(norm_bias)
    d_x, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        d_normed.float(), x.float(), x.shape[-1:], mean, rstd, weight, bias, (True, True, True)
    )
    normed = torch.addcmul(bias, (x - mean) * rstd, weight)
    return d_x.to(x.dtype), d_weight, d_bias, normed.to(d_normed.dtype)


def _empty_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised mean and rstd of x [..., D]: [..., 1] each, float32."""
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _layer_norm_linear_backend(norm_forward, norm_backward_recompute) -> Backend:
    """`norm_forward`: (x, norm_weight, norm_bias, eps, out_dtype) -> normed, mean, rstd. `norm_backward_recompute`:
    (d_normed, x, norm_weight, norm_bias, mean, rstd) -> gradients of x, norm_weight and norm_bias, and normed."""

    def forward(x, norm_weight, norm_bias, weight, bias, eps, in_float8, out_dtype):
        normed, mean, rstd = norm_forward(x, norm_weight, norm_bias, eps, out_dtype)
        return matmul(normed, weight, bias, in_float8), mean, rstd

    def backward(d_y, x, norm_weight, norm_bias, weight, mean, rstd, bias_gradient, in_float8):
        d_normed = input_gradient(d_y, weight, in_float8)
        *gradients, normed = norm_backward_recompute(d_normed, x, norm_weight, norm_bias, mean, rstd)
        return *gradients, *weight_gradients(d_y, normed, bias_gradient)

    return Backend(forward, backward)


layer_norm_linear_op = FusedOp(
    "layer_norm_linear",
    inputs="Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias, float eps, "
    "bool in_float8, ScalarType out_dtype",
    outputs=3,
    fake_forward=lambda x, norm_weight, norm_bias, weight, bias, eps, in_float8, out_dtype: (
        fake_matmul(x, weight, out_dtype),
        *_empty_statistics(x),
    ),
    backward_inputs="Tensor d_y, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor mean, "
    "Tensor rstd, bool bias_gradient, bool in_float8",
    backward_outputs=5,
    fake_backward=lambda d_y, x, norm_weight, norm_bias, weight, mean, rstd, bias_gradient, in_float8: (
        tensors.empty_like(x),
        tensors.empty_weight_gradient(norm_weight, x),
        tensors.empty_weight_gradient(norm_bias, x),
        *fake_weight_gradients(weight, bias_gradient),
    ),
    saved=lambda inputs, outputs: (*inputs[:4], *outputs[1:], inputs[4].requires_grad, inputs[6]),
    backends={
        "native": _layer_norm_linear_backend(_layer_norm_forward, _layer_norm_backward_recompute),
        "triton": _layer_norm_linear_backend(
            triton_function("layer_norm", "layer_norm_forward"),
            triton_function("layer_norm", "layer_norm_backward_recompute"),
        ),
    },
)


def _residual_forward(x, branch, norm_weight, norm_bias, eps, out_dtype):
    x_out = (x + branch).to(x.dtype)
    return x_out, *_layer_norm_forward(x_out, norm_weight, norm_bias, eps, out_dtype)


def _residual_backward_recompute(
    d_x_out, d_normed, x_out, norm_weight, norm_bias, mean, rstd, branch_dtype, branch_bias_gradient
):
    d_x, *others = _layer_norm_backward_recompute(d_normed, x_out.float(), norm_weight, norm_bias, mean, rstd)
    if d_x_out is not None:
        d_x += d_x_out
    d_branch_bias = d_x.flatten(0, -2).sum(0) if branch_bias_gradient else d_x.new_empty(0)
    # Copies even for equal dtypes: no two results may share memory.
    return d_x.to(x_out.dtype), d_x.to(branch_dtype, copy=True), *others[:-1], d_branch_bias, others[-1]


def _residual_norm_linear_backend(norm_forward, norm_backward_recompute) -> Backend:
    """`norm_forward`: (x, branch, norm_weight, norm_bias, eps, out_dtype) -> x_out, normed, mean, rstd.
    `norm_backward_recompute`: (d_x_out, d_normed, x_out, norm_weight, norm_bias, mean, rstd, branch_dtype,
    branch_bias_gradient) -> gradients of x, branch, norm_weight, norm_bias and branch_bias, and normed."""

    def forward(x, branch, norm_weight, norm_bias, weight, bias, branch_bias, eps, in_float8, out_dtype):
        x_out, normed, mean, rstd = norm_forward(x, branch, norm_weight, norm_bias, eps, out_dtype)
        return x_out, matmul(normed, weight, bias, in_float8), mean, rstd

    def backward(d_x_out, d_y, x_out, norm_weight, norm_bias, weight, mean, rstd, branch_dtype, *flags):
        bias_gradient, branch_bias_gradient, in_float8 = flags
        d_normed = input_gradient(d_y, weight, in_float8)
        *gradients, d_branch_bias, normed = norm_backward_recompute(
            d_x_out, d_normed, x_out, norm_weight, norm_bias, mean, rstd, branch_dtype, branch_bias_gradient
        )
        return *gradients, *weight_gradients(d_y, normed, bias_gradient), d_branch_bias

    return Backend(forward, backward)


def _fake_residual_backward(d_x_out, d_y, x_out, norm_weight, norm_bias, weight, mean, rstd, branch_dtype, *flags):
    bias_gradient, branch_bias_gradient, _ = flags
    return (
        tensors.empty_like(x_out),
        tensors.empty_like(x_out, branch_dtype),
        tensors.empty_weight_gradient(norm_weight, x_out),
        tensors.empty_weight_gradient(norm_bias, x_out),
        *fake_weight_gradients(weight, bias_gradient),
        tensors.empty_bias_gradient(x_out, branch_bias_gradient),
    )


residual_layer_norm_linear_op = FusedOp(
    "residual_layer_norm_linear",
    inputs="Tensor x, Tensor branch, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias, "
    "Tensor? branch_bias, float eps, bool in_float8, ScalarType out_dtype",
    outputs=4,
    results=2,
    fake_forward=lambda x, branch, norm_weight, norm_bias, weight, bias, branch_bias, eps, in_float8, out_dtype: (
        tensors.empty_like(x),
        fake_matmul(x, weight, out_dtype),
        *_empty_statistics(x),
    ),
    backward_inputs="Tensor? d_x_out, Tensor d_y, Tensor x_out, Tensor norm_weight, Tensor norm_bias, Tensor weight, "
    "Tensor mean, Tensor rstd, ScalarType branch_dtype, bool bias_gradient, bool branch_bias_gradient, bool in_float8",
    backward_outputs=7,
    fake_backward=_fake_residual_backward,
    saved=lambda inputs, outputs: (
        *(outputs[0], *inputs[2:5], *outputs[2:], inputs[1].dtype),
        *(inputs[5].requires_grad, inputs[6] is not None, inputs[8]),
    ),
    backends={
        "native": _residual_norm_linear_backend(_residual_forward, _residual_backward_recompute),
        "triton": _residual_norm_linear_backend(
            triton_function("layer_norm", "residual_layer_norm_forward"),
            triton_function("layer_norm", "residual_layer_norm_backward_recompute"),
        ),
    },
)


def _gated_linear_backend(gated: Backend, adaln: Backend) -> Backend:
    def forward(x, branch, gate, norm_weight, shift, scale, branch_bias, weight, bias, in_float8, out_dtype):
        x_out, h, rstd = gated.forward(x, branch, gate, norm_weight, shift, scale, branch_bias, EPS, out_dtype)
        return x_out, matmul(h, weight, bias, in_float8), rstd

    def recompute_separately(d_x_out, d_h, x_out, branch, gate, norm_weight, shift, scale, rstd, branch_bias_gradient):
        inputs = d_x_out, d_h, x_out, branch, gate, norm_weight, scale, rstd
        gradients = gated.backward(*inputs, branch_bias_gradient)
        return *gradients, adaln.forward(x_out, norm_weight, shift, scale, EPS, d_h.dtype)[0]

    def backward(d_x_out, d_y, x_out, branch, gate, norm_weight, shift, scale, weight, rstd, *flags):
        bias_gradient, branch_bias_gradient, in_float8 = flags
        d_h = input_gradient(d_y, weight, in_float8)
        *gradients, h = (gated.backward_recompute or recompute_separately)(
            *(d_x_out, d_h, x_out, branch, gate, norm_weight, shift, scale, rstd),
            branch_bias_gradient,
        )
        return *gradients, *weight_gradients(d_y, h, bias_gradient)

    return Backend(forward, backward)


def _fake_gated_linear(x, branch, gate, norm_weight, shift, scale, branch_bias, weight, bias, in_float8, out_dtype):
    rstd = x.new_empty(x.shape[:2], dtype=torch.float32)
    return tensors.empty_like(x), fake_matmul(x, weight, out_dtype), rstd


def _fake_gated_linear_backward(d_x_out, d_y, x_out, branch, gate, norm_weight, shift, scale, weight, rstd, *flags):
    bias_gradient, branch_bias_gradient, _ = flags
    d_gate, d_shift, d_scale = (tensors.empty_gradient(v) for v in (gate, scale, scale))
    d_norm_weight = tensors.empty_weight_gradient(norm_weight, x_out)
    d_bias = tensors.empty_bias_gradient(x_out, branch_bias_gradient)
    gradients = tensors.empty_like(x_out), tensors.empty_gradient(branch), d_gate, d_norm_weight, d_shift, d_scale
    return *gradients, d_bias, *fake_weight_gradients(weight, bias_gradient)


gated_residual_adaln_linear_op = FusedOp(
    "gated_residual_adaln_linear",
    inputs="Tensor x, Tensor branch, Tensor gate, Tensor norm_weight, Tensor shift, Tensor scale, "
    "Tensor? branch_bias, Tensor weight, Tensor bias, bool in_float8, ScalarType out_dtype",
    outputs=3,
    results=2,
    fake_forward=_fake_gated_linear,
    backward_inputs="Tensor? d_x_out, Tensor d_y, Tensor x_out, Tensor branch, Tensor gate, Tensor norm_weight, "
    "Tensor shift, Tensor scale, Tensor weight, Tensor rstd, bool bias_gradient, bool branch_bias_gradient, "
    "bool in_float8",
    backward_outputs=9,
    fake_backward=_fake_gated_linear_backward,
    saved=lambda inputs, outputs: (
        *(outputs[0], *inputs[1:6], inputs[7], outputs[2]),
        *(inputs[8].requires_grad, inputs[6] is not None, inputs[9]),
    ),
    backends={
        key: _gated_linear_backend(gated, adaln_modulate_op.backends[key])
        for key, gated in gated_residual_adaln_op.backends.items()
    },
)


def layer_norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float, wide: bool = False
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
        wide: see `linear.linear`.

    Returns:
        [B, T, N], bfloat16 under autocast to it, else in the input's dtype; sums are float32.

    Raises:
        ValueError: shapes that do not match.
    """
    check_weight("layer_norm_linear", x.shape[-1], weight, bias)
    chosen, in_float8 = recomputing_backend(x), runs_in_float8(wide)
    if not chosen:
        normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        return unfused_linear(normed, weight, bias, in_float8)
    return layer_norm_linear_op(chosen, x, norm_weight, norm_bias, weight, bias, eps, in_float8, torch.bfloat16)


def residual_layer_norm_linear(
    x: Tensor,
    branch: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_bias: Tensor | None = None,
    wide: bool = False,
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
        branch_bias: float32 [K], the bias that branch contains, or None; gets the sum of branch's gradient
            (`linear.shared_bias`).
        wide: see `linear.linear`.

    Returns:
        x_out [B, T, K] in x's dtype, and [B, T, N], bfloat16 under autocast to it; norm and sums are float32.

    Raises:
        ValueError: shapes that do not match.
    """
    name = "residual_layer_norm_linear"
    if branch.shape != x.shape:
        raise argument_error(name, f"branch must be {list(x.shape)}, got {list(branch.shape)}")
    tensors.check_contained(name, "branch_bias", branch, branch_bias)
    check_weight(name, x.shape[-1], weight, bias)
    chosen, in_float8 = recomputing_backend(x), runs_in_float8(wide)
    if not chosen:
        x = x + tensors.containing(branch, branch_bias)
        normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        return x, unfused_linear(normed, weight, bias, in_float8)
    inputs = x, branch, norm_weight, norm_bias, weight, bias, branch_bias
    return residual_layer_norm_linear_op(chosen, *inputs, eps, in_float8, torch.bfloat16)


def gated_residual_adaln_linear(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None = None,
    wide: bool = False,
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
        branch_bias: float32 [K], the bias that branch contains, or None; gets the sum of branch's gradient
            (`linear.shared_bias`).
        wide: see `linear.linear`.

    Returns:
        x_out [B, T, K] in x's dtype, and [B, T, N], bfloat16 under autocast to it; all other arithmetic is float32.

    Raises:
        ValueError: shapes that do not match.
    """
    name = "gated_residual_adaln_linear"
    check_modulation(name, x, norm_weight, shift, scale)
    check_branch(name, x, branch, gate, branch_bias)
    check_weight(name, x.shape[-1], weight, bias)
    inputs, in_float8 = (x, branch, gate, norm_weight, shift, scale), runs_in_float8(wide)
    chosen = recomputing_backend(x, "gated_residual_adaln")
    if not chosen:
        x, h = gated_residual_adaln(*inputs, EPS, matmul_dtype(x), branch_bias)
        return x, unfused_linear(h, weight, bias, in_float8)
    return gated_residual_adaln_linear_op(chosen, *inputs, branch_bias, weight, bias, in_float8, torch.bfloat16)


def _layer_norm_example(names):
    return lambda size, new: {**adaln_inputs(size, new, names), "norm_bias": new(size.width, dtype=size.weights)}


register_linear(layer_norm_linear, layer_norm_linear_op, _layer_norm_example("x norm_weight"), eps=1e-6)
register_linear(
    residual_layer_norm_linear,
    residual_layer_norm_linear_op,
    _layer_norm_example("x branch norm_weight"),
    contains="branch",
    eps=1e-6,
)
register_linear(
    gated_residual_adaln_linear,
    gated_residual_adaln_linear_op,
    lambda size, new: adaln_inputs(size, new, "x branch gate norm_weight shift scale branch_bias"),
)
