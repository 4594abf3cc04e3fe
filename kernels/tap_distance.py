"""tap_distance: one term of LPIPS. It has no C++ backend: on a CPU, the convolutions before it take most of the
time."""

import torch
from torch import Tensor

from unite_fast.kernels import backend
from unite_fast.kernels.fused_op import FusedOp, triton_backend
from unite_fast.kernels.registry import register
from unite_fast.kernels.tensors import argument_error, upcast

EPS = 1e-10


def tap_distance_ref(y: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    difference = (_unit(x) - _unit(y)).square()
    if mask is not None:
        difference = difference * mask
    return (difference * weight[:, None, None]).sum(dim=1).mean(dim=(1, 2))


def _unit(x: Tensor) -> Tensor:
    """Each pixel's channels divided by their norm."""
    x = upcast(x)
    # Where all channels are 0, the gradient of vector_norm is 0; that of sqrt(sum(x^2)) would be NaN.
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + EPS)


def pixels_first(x: Tensor) -> Tensor:
    """[B, C, H, W] as contiguous [B, H, W, C]; no copy if x is channels-last."""
    return x.permute(0, 2, 3, 1).contiguous()


def empty_channels_last(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


tap_distance_op = FusedOp(
    "tap_distance",
    inputs="Tensor y, Tensor x, Tensor weight, Tensor? mask",
    fake_forward=lambda y, x, weight, mask: (y.new_empty(y.shape[0], dtype=torch.float32),),
    backward_inputs="Tensor d_out, Tensor y, Tensor x, Tensor weight, Tensor? mask",
    backward_outputs=1,
    fake_backward=lambda d_out, y, x, weight, mask: (empty_channels_last(y),),
    saved=lambda inputs, outputs: inputs,
    backends={"triton": triton_backend("tap_distance")},
)


def tap_distance(y: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """The distance of two images' features after one tap of VGG16, a term of LPIPS.

        d = mean over h and w of sum over c of  weight_c m_chw (x_chw / (|x_hw| + eps) - y_chw / (|y_hw| + eps))^2

    |x_hw| is the norm over the channels of a pixel; where it is 0, its gradient is 0. All arithmetic is float32.
    Source: Zhang et al., arXiv 1801.03924, equation 1.

    Args:
        y: [B, C, H, W]; the only argument with a gradient.
        x: [B, C, H, W].
        weight: [C].
        mask: [B, C, H, W] of any number type, m above (dropout); None is 1.

    Returns:
        float32 [B] (float64 for float64).

    Raises:
        ValueError: shapes that do not match, or an argument other than y that requires a gradient.
    """
    op = "tap_distance"
    if y.dim() != 4 or 0 in y.shape[1:]:
        raise argument_error(op, f"y must be [B, C, H, W] with C, H and W above 0, got {list(y.shape)}")
    for name, other, shape in (("x", x, y.shape), ("weight", weight, y.shape[1:2]), ("mask", mask, y.shape)):
        if other is not None and other.shape != shape:
            raise argument_error(op, f"{name} must be {list(shape)}, got {list(other.shape)}")
        if other is not None and other.requires_grad:
            raise argument_error(op, f"{name} gets no gradient; detach it")
    # This op has no C++, so on a CPU the backend "native" runs the reference too.
    chosen = backend.choose(y) if y.is_cuda or backend.current() == "triton" else "reference"
    if chosen == "reference":
        return tap_distance_ref(y, x, weight, mask)
    return tap_distance_op(chosen, y, x.to(y.dtype), weight, mask)


def _example(size, new):
    """Features with `size.width` channels and `size.tokens` pixels."""
    shape = size.batch, size.width, size.tokens, 1
    y, x = (new(*shape, dtype=size.other).to(memory_format=torch.channels_last) for _ in range(2))
    return {"y": y, "x": x, "weight": new(size.width, dtype=size.weights), "mask": (x == x).to(torch.uint8)}


register(tap_distance, tap_distance_ref, tap_distance_op, example=_example, part="lpips")
