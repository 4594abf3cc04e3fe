"""Linears that keep little for the backward pass: what is cheap to make again is made again.

    linear(x, W, b)                               x W^T + b                              keeps x
    swiglu_linear(uw, W, b)                       linear(swiglu(uw), W, b)               keeps uw
    gelu_linear(u, W, b)                          linear(gelu(u), W, b)                  keeps u
    layer_norm_linear(x, w, v, W, b)              linear(layer_norm(x; w, v), W, b)      keeps x and two numbers a token
    residual_layer_norm_linear(x, branch, ..)     x_out, layer_norm_linear(x_out, ..) of x_out = x + branch
    gated_residual_adaln_linear(x, branch, ..)    x_out, linear(h, W, b)                 keeps x_out and branch
                                                  of x_out, h = gated_residual_adaln(x, branch, ..)
    linears(x, Ws, bs)                            linear(x, W, b) of each, side by side         keeps x

Shapes: x, uw and u [B, T, K] or [B, T, 2 K] (uw), W [N, K], b [N] -> [B, T, N]. Products are taken in bfloat16 under
autocast to it and in the input's precision otherwise; sums are float32. See product.py. In float32 the parts run one by
one and keep what they keep: small models on a CPU are trained so, for which more calls cost more than memory is worth.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from unite_fast.kernels import backend, layout, op
from unite_fast.kernels.adaln_modulate import _fused as adaln_op
from unite_fast.kernels.adaln_modulate import check_modulation
from unite_fast.kernels.casts import joined
from unite_fast.kernels.common import EPS, matmul_dtype, mistake
from unite_fast.kernels.gated_residual_adaln import _fused as gated_op
from unite_fast.kernels.gated_residual_adaln import check_branch, gated_residual_adaln
from unite_fast.kernels.op import Body, FusedOp, triton_body
from unite_fast.kernels.product import input_gradient, product, product_backward, weight_gradients
from unite_fast.kernels.swiglu import _fused as swiglu_op
from unite_fast.kernels.swiglu import swiglu


def _like_product(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype or x.dtype)


def _like_product_gradients(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Those of weight and bias: float32 whatever they are, as `product_backward` gives them."""
    return layout.room(weight, torch.float32), weight.new_empty(weight.shape[0], dtype=torch.float32)


def _activation_linear(name: str, activation: dict[str, Body]) -> FusedOp:
    """The op linear(f(x), W, b) of one activation f, which keeps x."""

    def body(f: Body) -> Body:
        def forward(x, weight, bias):
            return (product(f.forward(x)[0], weight, bias),)

        def apart(d_activated, x):
            return f.backward(d_activated, x)[0], f.forward(x)[0]

        def backward(d_y, x, weight):
            d_x, activated = (f.backward_again or apart)(input_gradient(d_y, weight), x)
            return d_x, *weight_gradients(d_y, activated)

        return Body(forward, backward)

    return FusedOp(
        name,
        inputs="Tensor x, Tensor weight, Tensor bias",
        outputs="Tensor",
        results=1,
        like_forward=lambda x, weight, bias: (_like_product(x, weight),),
        backward_inputs="Tensor d_y, Tensor x, Tensor weight",
        backward_outputs="Tensor, Tensor, Tensor",
        like_backward=lambda d_y, x, weight: (layout.room(x), *_like_product_gradients(weight)),
        saved=lambda inputs, outputs: inputs[:2],
        bodies={name: body(f) for name, f in activation.items()},
    )


def _everywhere(forward, backward) -> dict[str, Body]:
    """A body of PyTorch's own operators serves every device."""
    return dict.fromkeys(("native", "triton"), Body(forward, backward))


_linear = _activation_linear("linear", _everywhere(lambda x: (x,), lambda d, x: (d,)))
_swiglu_linear = _activation_linear("swiglu_linear", swiglu_op.bodies)
_gelu_linear = _activation_linear(
    "gelu_linear", _everywhere(lambda u: (F.gelu(u),), lambda d, u: (torch.ops.aten.gelu_backward(d, u),))
)


def _layer_norm_forward(x, norm_weight, norm_bias, eps, out_dtype):
    weights = layout.floats(norm_weight), layout.floats(norm_bias)
    normed, mean, inverse = torch.native_layer_norm(x.float(), x.shape[-1:], *weights, eps)
    return normed.to(out_dtype), mean, inverse


def _layer_norm_backward(d_normed, x, norm_weight, mean, inverse):
    weight = layout.floats(norm_weight)
    d_x, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        d_normed.float(), x.float(), x.shape[-1:], mean, inverse, weight, weight, (True, True, True)
    )
    return d_x.to(x.dtype), d_weight, d_bias


def _normed_again(x, norm_weight, norm_bias, mean, inverse, dtype):
    """The LayerNorm of x from its mean and inverse deviation."""
    return torch.addcmul(layout.floats(norm_bias), (x - mean) * inverse, layout.floats(norm_weight)).to(dtype)


_LAYER_NORM = {
    "native": Body(_layer_norm_forward, _layer_norm_backward),
    "triton": triton_body("layer_norm", "layer_norm", again=True),
}
"""(x, weight, bias, eps, out_dtype) -> out, mean and inverse deviation; (d_out, x, weight, the last two) -> the
gradients of x, weight and bias."""


def _layer_norm_linear_body(norm: Body) -> Body:
    def forward(x, norm_weight, norm_bias, weight, bias, eps, out_dtype):
        normed, mean, inverse = norm.forward(x, norm_weight, norm_bias, eps, out_dtype)
        return product(normed, weight, bias), mean, inverse

    def apart(d_normed, x, norm_weight, norm_bias, mean, inverse):
        normed = _normed_again(x, norm_weight, norm_bias, mean, inverse, d_normed.dtype)
        return *norm.backward(d_normed, x, norm_weight, mean, inverse), normed

    def backward(d_y, x, norm_weight, norm_bias, weight, mean, inverse):
        *gradients, normed = (norm.backward_again or apart)(
            input_gradient(d_y, weight), x, norm_weight, norm_bias, mean, inverse
        )
        return *gradients, *weight_gradients(d_y, normed)

    return Body(forward, backward)


_layer_norm_linear = FusedOp(
    "layer_norm_linear",
    inputs="Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias, float eps, "
    "ScalarType out_dtype",
    outputs="Tensor, Tensor, Tensor",
    results=1,
    like_forward=lambda x, norm_weight, norm_bias, weight, bias, eps, out_dtype: (
        _like_product(x, weight, out_dtype),
        *(x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(2)),
    ),
    backward_inputs="Tensor d_y, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor mean, "
    "Tensor inverse",
    backward_outputs="Tensor, Tensor, Tensor, Tensor, Tensor",
    like_backward=lambda d_y, x, norm_weight, norm_bias, weight, mean, inverse: (
        layout.room(x),
        layout.room_floats(norm_weight, x),
        layout.room_floats(norm_bias, x),
        *_like_product_gradients(weight),
    ),
    saved=lambda inputs, outputs: (*inputs[:4], *outputs[1:]),
    bodies={name: _layer_norm_linear_body(norm) for name, norm in _LAYER_NORM.items()},
)


def _residual_forward(x, branch, norm_weight, norm_bias, eps, out_dtype):
    x_out = (x + branch).to(x.dtype)
    return x_out, *_layer_norm_forward(x_out, norm_weight, norm_bias, eps, out_dtype)


def _residual_backward_again(d_x_out, d_normed, x_out, branch_dtype, norm_weight, norm_bias, mean, inverse):
    d_x, d_norm_weight, d_norm_bias = _layer_norm_backward(d_normed, x_out, norm_weight, mean, inverse)
    if d_x_out is not None:
        d_x += d_x_out
    normed = _normed_again(x_out, norm_weight, norm_bias, mean, inverse, d_normed.dtype)
    # A copy also where the types are the same: no two results share memory.
    return d_x, d_x.to(branch_dtype, copy=True), d_norm_weight, d_norm_bias, normed


def _residual_norm_linear_body(norm: Body) -> Body:
    """From (x, branch, weight, bias, eps, out_dtype) -> x_out, out, mean and inverse deviation, and from (d_x_out,
    d_out, x_out, type of the branch, weight, bias, the last two) -> the gradients of x, branch, weight and bias, and
    out."""

    def forward(x, branch, norm_weight, norm_bias, weight, bias, eps, out_dtype):
        x_out, normed, mean, inverse = norm.forward(x, branch, norm_weight, norm_bias, eps, out_dtype)
        return x_out, product(normed, weight, bias), mean, inverse

    def backward(d_x_out, d_y, x_out, norm_weight, norm_bias, weight, mean, inverse, branch_dtype):
        d_normed = input_gradient(d_y, weight)
        *gradients, normed = norm.backward_again(
            d_x_out, d_normed, x_out, branch_dtype, norm_weight, norm_bias, mean, inverse
        )
        return *gradients, *weight_gradients(d_y, normed)

    return Body(forward, backward)


_residual_layer_norm_linear = FusedOp(
    "residual_layer_norm_linear",
    inputs="Tensor x, Tensor branch, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias, float eps, "
    "ScalarType out_dtype",
    outputs="Tensor, Tensor, Tensor, Tensor",
    results=2,
    like_forward=lambda x, branch, norm_weight, norm_bias, weight, bias, eps, out_dtype: (
        layout.room(x),
        _like_product(x, weight, out_dtype),
        *(x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(2)),
    ),
    backward_inputs="Tensor? d_x_out, Tensor d_y, Tensor x_out, Tensor norm_weight, Tensor norm_bias, Tensor weight, "
    "Tensor mean, Tensor inverse, ScalarType branch_dtype",
    backward_outputs="Tensor, Tensor, Tensor, Tensor, Tensor, Tensor",
    like_backward=lambda d_x_out, d_y, x_out, norm_weight, norm_bias, weight, mean, inverse, branch_dtype: (
        layout.room(x_out),
        layout.room(x_out, branch_dtype),
        layout.room_floats(norm_weight, x_out),
        layout.room_floats(norm_bias, x_out),
        *_like_product_gradients(weight),
    ),
    saved=lambda inputs, outputs: (outputs[0], *inputs[2:5], *outputs[2:], inputs[1].dtype),
    bodies={
        "native": _residual_norm_linear_body(Body(_residual_forward, None, backward_again=_residual_backward_again)),
        "triton": _residual_norm_linear_body(triton_body("layer_norm", "residual_layer_norm", again=True)),
    },
)


def _gated_linear_body(gated: Body, adaln: Body) -> Body:
    def forward(x, branch, gate, norm_weight, shift, scale, weight, bias, out_dtype):
        x_out, h, inverse = gated.forward(x, branch, gate, norm_weight, shift, scale, EPS, out_dtype)
        return x_out, product(h, weight, bias), inverse

    def apart(d_x_out, d_h, x_out, branch, gate, norm_weight, shift, scale, inverse):
        gradients = gated.backward(d_x_out, d_h, x_out, branch, gate, norm_weight, scale, inverse)
        return *gradients, adaln.forward(x_out, norm_weight, shift, scale, EPS, d_h.dtype)[0]

    def backward(d_x_out, d_y, x_out, branch, gate, norm_weight, shift, scale, weight, inverse):
        *gradients, h = (gated.backward_again or apart)(
            d_x_out, input_gradient(d_y, weight), x_out, branch, gate, norm_weight, shift, scale, inverse
        )
        return *gradients, *weight_gradients(d_y, h)

    return Body(forward, backward)


def _like_gated_linear(x, branch, gate, norm_weight, shift, scale, weight, bias, out_dtype):
    inverse = x.new_empty(x.shape[:2], dtype=torch.float32)
    return layout.room(x), _like_product(x, weight, out_dtype), inverse


def _like_gated_linear_backward(d_x_out, d_y, x_out, branch, gate, norm_weight, shift, scale, weight, inverse):
    d_gate, d_shift, d_scale = (layout.room_typed(v) for v in (gate, scale, scale))
    d_norm_weight = layout.room_floats(norm_weight, x_out)
    gradients = layout.room(x_out), layout.room_typed(branch), d_gate, d_norm_weight, d_shift, d_scale
    return *gradients, *_like_product_gradients(weight)


_gated_residual_adaln_linear = FusedOp(
    "gated_residual_adaln_linear",
    inputs="Tensor x, Tensor branch, Tensor gate, Tensor norm_weight, Tensor shift, Tensor scale, Tensor weight, "
    "Tensor bias, ScalarType out_dtype",
    outputs="Tensor, Tensor, Tensor",
    results=2,
    like_forward=_like_gated_linear,
    backward_inputs="Tensor? d_x_out, Tensor d_y, Tensor x_out, Tensor branch, Tensor gate, Tensor norm_weight, "
    "Tensor shift, Tensor scale, Tensor weight, Tensor inverse",
    backward_outputs="Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor",
    like_backward=_like_gated_linear_backward,
    saved=lambda inputs, outputs: (outputs[0], *inputs[1:7], outputs[2]),
    bodies={body: _gated_linear_body(gated_op.bodies[body], adaln_op.bodies[body]) for body in gated_op.bodies},
)


def body_for(x: Tensor) -> str | None:
    """The body of an op that keeps little; None where its parts run one by one."""
    dtype = matmul_dtype(x)
    body = backend.choose(x, dtype)
    return None if body == "reference" or dtype != torch.bfloat16 else body


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A Linear; see the module's docstring.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check("linear", x.shape[-1], weight, bias)
    return _run(_linear, lambda x: x, x, weight, bias)


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Linears of one input x [B, K] by one product: weights [N_i, K], biases [N_i] -> [B, sum of N_i]. Errors as
    `linear`."""
    for weight, bias in zip(weights, biases, strict=True):
        _check("linears", x.shape[-1], weight, bias)
    # For a compiler and for fake tensors each is an operator of its own.
    if not body_for(x) or torch.compiler.is_compiling() or op.seen_by_dispatcher(x):
        return torch.cat([linear(x, *each) for each in zip(weights, biases, strict=True)], dim=-1)
    return _Linears.apply(x.to(torch.bfloat16), *weights, *biases)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        half = len(parameters) // 2
        ctx.save_for_backward(x, *parameters[:half])
        with torch.autocast(x.device.type, enabled=False):
            return product(x, joined(parameters[:half], x.dtype), joined(parameters[half:], x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        x, *weights = ctx.saved_tensors
        d_x, d_weights, d_biases = product_backward(d_y, x, joined(weights, x.dtype))
        sizes = [len(weight) for weight in weights]
        return d_x, *d_weights.split(sizes), *d_biases.split(sizes)


def swiglu_linear(uw: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The second half of a SwiGLU; see the module's docstring. Errors as `linear`."""
    _check("swiglu_linear", uw.shape[-1] / 2, weight, bias)
    return _run(_swiglu_linear, swiglu, uw, weight, bias)


def gelu_linear(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The second half of an MLP with the exact GELU; see the module's docstring. Errors as `linear`."""
    _check("gelu_linear", u.shape[-1], weight, bias)
    return _run(_gelu_linear, F.gelu, u, weight, bias)


def _run(fused: FusedOp, activation: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    body = body_for(x)
    return fused(body, x.to(torch.bfloat16), weight, bias) if body else F.linear(activation(x), weight, bias)


def layer_norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """A Linear of a LayerNorm; see the module's docstring. Errors as `linear`."""
    _check("layer_norm_linear", x.shape[-1], weight, bias)
    body = body_for(x)
    if not body:
        return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias)
    return _layer_norm_linear(body, x, norm_weight, norm_bias, weight, bias, eps, torch.bfloat16)


def residual_layer_norm_linear(
    x: Tensor, branch: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add a branch, then a Linear of a LayerNorm; see the module's docstring. Errors as `linear`."""
    name = "residual_layer_norm_linear"
    if branch.shape != x.shape:
        raise mistake(name, f"branch must be {list(x.shape)}, got {list(branch.shape)}")
    _check(name, x.shape[-1], weight, bias)
    body = body_for(x)
    if not body:
        x = x + branch
        return x, F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias)
    return _residual_layer_norm_linear(body, x, branch, norm_weight, norm_bias, weight, bias, eps, torch.bfloat16)


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
    """Add a branch, normalise, modulate and multiply; see the module's docstring. Errors as `linear`."""
    name = "gated_residual_adaln_linear"
    check_modulation(name, x, norm_weight, shift, scale)
    check_branch(name, x, branch, gate)
    _check(name, x.shape[-1], weight, bias)
    inputs, body = (x, branch, gate, norm_weight, shift, scale), body_for(x)
    if not body:
        x, h = gated_residual_adaln(*inputs, EPS, matmul_dtype(x))
        return x, F.linear(h, weight, bias)
    return _gated_residual_adaln_linear(body, *inputs, weight, bias, torch.bfloat16)


def _check(name: str, width: float, weight: Tensor, bias: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[1] != width:
        raise mistake(name, f"weight must be [N, {width:g}], got {list(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise mistake(name, f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
