"""flow_loss: the LayerNorm of the encoder's raw output and the flow loss of the result, in one pass."""

import torch
from torch import Tensor
from torch.nn import functional as F

from unite_fast.kernels import backend, native, tensors
from unite_fast.kernels.fused_op import Backend, FusedOp, triton_backend
from unite_fast.kernels.registry import register
from unite_fast.kernels.tensors import argument_error, upcast


def flow_loss_ref(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    z: Tensor,
    t: Tensor,
    min_time_left: float,
    eps: float = 1e-5,
    lengths: Tensor | None = None,
) -> Tensor:
    left = (1 - t).clamp_min(min_time_left)[..., None, None]
    if lengths is None:
        return _errors(y, weight, bias, z, left, eps).mean(dim=(2, 3))
    counts = (torch.arange(y.shape[2], device=y.device) < lengths[:, None])[..., None]  # [B, N, 1]
    # Before the norm, whose backward pass would multiply a NaN of a pad by 0, and after it, which makes a pad the bias.
    y, z = torch.where(counts, y, 0), torch.where(counts, z, 0)
    errors = torch.where(counts, _errors(y, weight, bias, z, left, eps), 0)
    return errors.sum(dim=(2, 3)) / (lengths * y.shape[3])


def _errors(y: Tensor, weight: Tensor, bias: Tensor, z: Tensor, left: Tensor, eps: float) -> Tensor:
    """Squared errors of the velocity, [F, B, N, C]."""
    prediction = F.layer_norm(upcast(y), weight.shape, upcast(weight), upcast(bias), eps)
    return ((upcast(z) - prediction) / left).square()


def _fake_forward(y, weight, bias, z, t, min_time_left, eps, lengths):
    loss, share = (y.new_empty(t.shape, dtype=torch.float32) for _ in range(2))
    mean, rstd = (y.new_empty(y.shape[:3], dtype=torch.float32) for _ in range(2))
    return loss, share, mean, rstd


def _native_forward(y, weight, bias, z, t, min_time_left, eps, lengths):
    loss, *statistics = outputs = _fake_forward(y, weight, bias, z, t, min_time_left, eps, lengths)
    inputs, t = _dense(y, weight, bias, z, lengths), tensors.as_float32(t)
    arguments = _native_arguments(*inputs, *statistics)
    native.run("flow_loss_forward", *arguments, t.data_ptr(), min_time_left, eps, loss.data_ptr())
    return outputs


def _fake_backward(d_loss, y, weight, bias, z, share, mean, rstd, lengths):
    return tensors.empty_like(y), tensors.empty_weight_gradient(weight, y), tensors.empty_weight_gradient(bias, y)


def _native_backward(d_loss, y, weight, bias, z, share, mean, rstd, lengths):
    gradients = _fake_backward(d_loss, y, weight, bias, z, share, mean, rstd, lengths)
    inputs, d_loss = _dense(y, weight, bias, z, lengths), tensors.as_float32(d_loss)
    arguments = _native_arguments(*inputs, share, mean, rstd)
    native.run("flow_loss_backward", *arguments, d_loss.data_ptr(), *(g.data_ptr() for g in gradients))
    return gradients


def _dense(y, weight, bias, z, lengths):
    lengths = None if lengths is None else lengths.int().contiguous()
    weight, bias, z = tensors.as_float32(weight), tensors.as_float32(bias), tensors.as_supported(z)
    return y.contiguous(), weight, bias, z.contiguous(), lengths


def _native_arguments(y, weight, bias, z, lengths, share, mean, rstd):
    """Arguments that both passes share. The caller must keep the tensors alive during the call."""
    typed_y, typed_z = ((tensors.DTYPES[x.dtype], x.data_ptr()) for x in (y, z))
    others = native.address(lengths), share.data_ptr(), mean.data_ptr(), rstd.data_ptr()
    return *y.shape, *typed_y, weight.data_ptr(), bias.data_ptr(), *typed_z, *others


flow_loss_op = FusedOp(
    "flow_loss",
    inputs="Tensor y, Tensor weight, Tensor bias, Tensor z, Tensor t, float min_time_left, float eps, Tensor? lengths",
    outputs=4,
    fake_forward=_fake_forward,
    backward_inputs="Tensor d_loss, Tensor y, Tensor weight, Tensor bias, Tensor z, Tensor share, Tensor mean, "
    "Tensor rstd, Tensor? lengths",
    backward_outputs=3,
    fake_backward=_fake_backward,
    saved=lambda inputs, outputs: (*inputs[:4], *outputs[1:], inputs[7]),
    backends={"native": Backend(_native_forward, _native_backward), "triton": triton_backend("flow_loss")},
)


def flow_loss(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    z: Tensor,
    t: Tensor,
    min_time_left: float,
    eps: float = 1e-5,
    lengths: Tensor | None = None,
) -> Tensor:
    """LayerNorm of y and the flow loss of the result against z, for each draw and sample.

        prediction = (y - mean(y)) / sqrt(var(y) + eps) * weight + bias
        loss       = mean over N and C of ((z - prediction) / max(1 - t, min_time_left))^2

    With `lengths`, the mean is over the first lengths[b] tokens of sample b. The others are pads: nothing of them
    reaches a loss or a gradient, not even a NaN, and the gradient of y is 0 there.

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
        lengths: int32 or int64 [B], tokens of each sample that count, 1 to N; None for all. The values are not checked,
            because that would wait for the GPU: the loss of a sample with another number means nothing.

    Returns:
        float32 [F, B].

    Raises:
        ValueError: shapes or dtypes that do not match, or a z or t that requires a gradient.
    """
    _check(y, weight, bias, z, t, lengths)
    chosen = backend.choose(y, op="flow_loss")
    if chosen == "reference":
        return flow_loss_ref(y, weight, bias, z, t, min_time_left, eps, lengths)
    return flow_loss_op(chosen, y, weight, bias, z, t, min_time_left, eps, lengths)


def _check(y: Tensor, weight: Tensor, bias: Tensor, z: Tensor, t: Tensor, lengths: Tensor | None) -> None:
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
    if lengths is None:
        return
    integers = lengths.dtype in (torch.int32, torch.int64)
    if lengths.shape != y.shape[1:2] or not integers or lengths.device != y.device:
        got = f"{lengths.dtype} {list(lengths.shape)} on {lengths.device}"
        raise argument_error(op, f"lengths must be int32 or int64 [{y.shape[1]}] on {y.device}, got {got}")


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
        "lengths": None,
    }


def _example_with_lengths(size, new):
    example = _example(size, new)
    # From N down to 1 and again.
    lengths = size.tokens - torch.arange(size.batch, dtype=torch.int32) % size.tokens
    return example | {"lengths": lengths.to(example["y"].device)}


register(
    flow_loss,
    flow_loss_ref,
    flow_loss_op,
    example=_example,
    variants={"lengths": _example_with_lengths},
    part="latents",
)
