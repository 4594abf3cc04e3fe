"""flow_loss: the LayerNorm of the encoder's raw output and the flow loss of the result, in one pass."""

import torch
from torch import Tensor
from torch.nn import functional as F

from unite_fast.kernels import backend, native, tensors
from unite_fast.kernels.fused_op import Backend, FusedOp, triton_backend
from unite_fast.kernels.registry import register
from unite_fast.kernels.tensors import argument_error, upcast


def flow_loss_ref(
    y: Tensor, weight: Tensor, bias: Tensor, z: Tensor, t: Tensor, min_time_left: float, eps: float = 1e-5
) -> Tensor:
    prediction = F.layer_norm(upcast(y), weight.shape, upcast(weight), upcast(bias), eps)
    left = (1 - t).clamp_min(min_time_left)
    return ((upcast(z) - prediction) / left[..., None, None]).square().mean(dim=(2, 3))


def _fake_forward(y, weight, bias, z, t, min_time_left, eps):
    loss, share = (y.new_empty(t.shape, dtype=torch.float32) for _ in range(2))
    mean, rstd = (y.new_empty(y.shape[:3], dtype=torch.float32) for _ in range(2))
    return loss, share, mean, rstd


def _native_forward(y, weight, bias, z, t, min_time_left, eps):
    loss, *statistics = outputs = _fake_forward(y, weight, bias, z, t, min_time_left, eps)
    inputs, t = _dense(y, weight, bias, z), tensors.as_float32(t)
    arguments = _native_arguments(*inputs, *statistics)
    native.run("flow_loss_forward", *arguments, t.data_ptr(), min_time_left, eps, loss.data_ptr())
    return outputs


def _fake_backward(d_loss, y, weight, bias, z, share, mean, rstd):
    return tensors.empty_like(y), tensors.empty_weight_gradient(weight, y), tensors.empty_weight_gradient(bias, y)


def _native_backward(d_loss, y, weight, bias, z, share, mean, rstd):
    gradients = _fake_backward(d_loss, y, weight, bias, z, share, mean, rstd)
    inputs, d_loss = _dense(y, weight, bias, z), tensors.as_float32(d_loss)
    arguments = _native_arguments(*inputs, share, mean, rstd)
    native.run("flow_loss_backward", *arguments, d_loss.data_ptr(), *(g.data_ptr() for g in gradients))
    return gradients


def _dense(y, weight, bias, z):
    return y.contiguous(), tensors.as_float32(weight), tensors.as_float32(bias), tensors.as_supported(z).contiguous()


def _native_arguments(y, weight, bias, z, share, mean, rstd):
    """Arguments that both passes share. The caller must keep the tensors alive during the call."""
    typed_y, typed_z = ((tensors.DTYPES[x.dtype], x.data_ptr()) for x in (y, z))
    statistics = share.data_ptr(), mean.data_ptr(), rstd.data_ptr()
    return *y.shape, *typed_y, weight.data_ptr(), bias.data_ptr(), *typed_z, *statistics


flow_loss_op = FusedOp(
    "flow_loss",
    inputs="Tensor y, Tensor weight, Tensor bias, Tensor z, Tensor t, float min_time_left, float eps",
    outputs=4,
    fake_forward=_fake_forward,
    backward_inputs="Tensor d_loss, Tensor y, Tensor weight, Tensor bias, Tensor z, Tensor share, Tensor mean, "
    "Tensor rstd",
    backward_outputs=3,
    fake_backward=_fake_backward,
    saved=lambda inputs, outputs: (*inputs[:4], *outputs[1:]),
    backends={"native": Backend(_native_forward, _native_backward), "triton": triton_backend("flow_loss")},
)


def flow_loss(
    y: Tensor, weight: Tensor, bias: Tensor, z: Tensor, t: Tensor, min_time_left: float, eps: float = 1e-5
) -> Tensor:
    """LayerNorm of y and the flow loss of the result against z, for each draw and sample.

        prediction = (y - mean(y)) / sqrt(var(y) + eps) * weight + bias
        loss       = mean over N and C of ((z - prediction) / max(1 - t, min_time_left))^2

    Mean and variance are over the C channels of a token. All sums are float32. The prediction is never written to
    memory; backward recomputes it. Source: Liu et al., arXiv 2209.03003, with the velocity of the straight path
    expressed by its predicted end.

    Args:
        y: [F, B, N, C], the output of the encoder for F flow draws.
        weight: [C], of the LayerNorm.
        bias: [C], of the LayerNorm.
        z: [B, N, C], the latents; gets no gradient.
        t: float32 [F, B], the times; gets no gradient.
        min_time_left: lower bound of 1 - t, above 0.
        eps: added to the variance.

    Returns:
        float32 [F, B].

    Raises:
        ValueError: shapes that do not match, or a z or t that requires a gradient.
    """
    _check(y, weight, bias, z, t)
    chosen = backend.choose(y, op="flow_loss")
    if chosen == "reference":
        return flow_loss_ref(y, weight, bias, z, t, min_time_left, eps)
    return flow_loss_op(chosen, y, weight, bias, z, t, min_time_left, eps)


def _check(y: Tensor, weight: Tensor, bias: Tensor, z: Tensor, t: Tensor) -> None:
    op = "flow_loss"
    if y.dim() != 4 or 0 in y.shape[2:]:
        raise argument_error(op, f"y must be [F, B, N, C] with N and C above 0, got {list(y.shape)}")
    for name, x, shape in (("weight", weight, y.shape[3:]), ("bias", bias, y.shape[3:]), ("z", z, y.shape[1:])):
        if x.shape != shape:
            raise argument_error(op, f"{name} must be {list(shape)}, got {list(x.shape)}")
    if t.shape != y.shape[:2]:
        raise argument_error(op, f"t must be {list(y.shape[:2])}, got {list(t.shape)}")
    if z.requires_grad or t.requires_grad:
        raise argument_error(op, f"{'z' if z.requires_grad else 't'} gets no gradient; detach it")


def _example(size, new):
    f, b, n, c = size.draws, size.batch, size.tokens, size.width
    return {
        "y": new(f, b, n, c, dtype=size.other),
        "weight": new(c, dtype=size.weights, around=1.0),
        "bias": new(c, dtype=size.weights),
        "z": new(b, n, c, dtype=size.residual),
        "t": new(f, b).sigmoid(),
        "min_time_left": 0.05,
        "eps": 1e-5,
    }


register(flow_loss, flow_loss_ref, flow_loss_op, example=_example, part="latents")
