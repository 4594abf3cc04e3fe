"""flow_loss: the LayerNorm of the encoder's raw output and the flow loss of what comes out, in one pass.

    prediction = (y - mean(y)) / sqrt(var(y) + eps) * weight + bias
    loss = mean over N and C of ((z - prediction) / max(1 - t, min_time_left))^2

Shapes: y [F, B, N, C], weight and bias [C], z [B, N, C], t float32 [F, B] -> loss float32 [F, B]. Mean and variance are
those of a token's C channels. The prediction never lands in memory; the backward pass makes it again. All sums are
float32. z and t get no gradient.
Source: Liu et al., arXiv 2209.03003: the velocity of the straight path, its predicted end in the velocity's place.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from unite_fast.kernels import backend, layout, native
from unite_fast.kernels.common import mistake, upcast
from unite_fast.kernels.op import Body, FusedOp, triton_body


def flow_loss_ref(
    y: Tensor, weight: Tensor, bias: Tensor, z: Tensor, t: Tensor, min_time_left: float, eps: float = 1e-5
) -> Tensor:
    prediction = F.layer_norm(upcast(y), weight.shape, upcast(weight), upcast(bias), eps)
    left = (1 - t).clamp_min(min_time_left)
    return ((upcast(z) - prediction) / left[..., None, None]).square().mean(dim=(2, 3))


def _like_forward(y, weight, bias, z, t, min_time_left, eps):
    loss, share = (y.new_empty(t.shape, dtype=torch.float32) for _ in range(2))
    mean, inverse = (y.new_empty(y.shape[:3], dtype=torch.float32) for _ in range(2))
    return loss, share, mean, inverse


def _native_forward(y, weight, bias, z, t, min_time_left, eps):
    loss, *statistics = outputs = _like_forward(y, weight, bias, z, t, min_time_left, eps)
    inputs, t = _dense(y, weight, bias, z), layout.floats(t)
    arguments = _native_arguments(*inputs, *statistics)
    native.run("flow_loss_forward", *arguments, t.data_ptr(), min_time_left, eps, loss.data_ptr())
    return outputs


def _like_backward(d_loss, y, weight, bias, z, share, mean, inverse):
    return layout.room(y), layout.room_floats(weight, y), layout.room_floats(bias, y)


def _native_backward(d_loss, y, weight, bias, z, share, mean, inverse):
    gradients = _like_backward(d_loss, y, weight, bias, z, share, mean, inverse)
    inputs, d_loss = _dense(y, weight, bias, z), layout.floats(d_loss)
    arguments = _native_arguments(*inputs, share, mean, inverse)
    native.run("flow_loss_backward", *arguments, d_loss.data_ptr(), *(g.data_ptr() for g in gradients))
    return gradients


def _dense(y, weight, bias, z):
    return y.contiguous(), layout.floats(weight), layout.floats(bias), layout.typed(z).contiguous()


def _native_arguments(y, weight, bias, z, share, mean, inverse):
    """Those that both passes have. The tensors must outlive the call."""
    typed_y, typed_z = ((layout.TYPES[x.dtype], x.data_ptr()) for x in (y, z))
    statistics = share.data_ptr(), mean.data_ptr(), inverse.data_ptr()
    return *y.shape, *typed_y, weight.data_ptr(), bias.data_ptr(), *typed_z, *statistics


_fused = FusedOp(
    "flow_loss",
    inputs="Tensor y, Tensor weight, Tensor bias, Tensor z, Tensor t, float min_time_left, float eps",
    outputs="Tensor, Tensor, Tensor, Tensor",
    results=1,
    like_forward=_like_forward,
    backward_inputs="Tensor d_loss, Tensor y, Tensor weight, Tensor bias, Tensor z, Tensor share, Tensor mean, "
    "Tensor inverse",
    backward_outputs="Tensor, Tensor, Tensor",
    like_backward=_like_backward,
    saved=lambda inputs, outputs: (*inputs[:4], *outputs[1:]),
    bodies={"native": Body(_native_forward, _native_backward), "triton": triton_body("flow_loss", "flow_loss")},
)


def flow_loss(
    y: Tensor, weight: Tensor, bias: Tensor, z: Tensor, t: Tensor, min_time_left: float, eps: float = 1e-5
) -> Tensor:
    """The loss of each sample; see the module's docstring. `min_time_left` is above 0.

    Raises:
        ValueError: shapes that do not belong together, or a z or t that wants a gradient.
    """
    _check(y, weight, bias, z, t)
    body = backend.choose(y)
    if body == "reference":
        return flow_loss_ref(y, weight, bias, z, t, min_time_left, eps)
    return _fused(body, y, weight, bias, z, t, min_time_left, eps)


def _check(y: Tensor, weight: Tensor, bias: Tensor, z: Tensor, t: Tensor) -> None:
    op = "flow_loss"
    if y.dim() != 4 or 0 in y.shape[2:]:
        raise mistake(op, f"y must be [F, B, N, C] with N and C above 0, got {list(y.shape)}")
    for name, x, shape in (("weight", weight, y.shape[3:]), ("bias", bias, y.shape[3:]), ("z", z, y.shape[1:])):
        if x.shape != shape:
            raise mistake(op, f"{name} must be {list(shape)}, got {list(x.shape)}")
    if t.shape != y.shape[:2]:
        raise mistake(op, f"t must be {list(y.shape[:2])}, got {list(t.shape)}")
    if z.requires_grad or t.requires_grad:
        raise mistake(op, f"{'z' if z.requires_grad else 't'} gets no gradient; detach it")
