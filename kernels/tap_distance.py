"""tap_distance: one term of LPIPS, the distance of two images' features after one tap of VGG16.

    d = mean over h and w of sum over c of  weight_c m_chw (x_chw / (|x_hw| + eps) - y_chw / (|y_hw| + eps))^2

Shapes: y and x [B, C, H, W], weight [C], m (a dropout mask, any number type) [B, C, H, W] or None -> d [B], float32
(float64 of float64). |x_hw| is the norm over the channels of a pixel. All arithmetic is float32. y alone gets a
gradient; that of a norm which is 0 is 0.
Source: Zhang et al., arXiv 1801.03924, equation 1.

There is no C++ body: on a CPU, the convolutions before it take most of the time.
"""

import torch
from torch import Tensor

from unite_fast.kernels import backend
from unite_fast.kernels.common import mistake, upcast
from unite_fast.kernels.op import FusedOp, triton_body

EPS = 1e-10


def tap_distance_ref(y: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    difference = (_unit(x) - _unit(y)).square()
    if mask is not None:
        difference = difference * mask
    return (difference * weight[:, None, None]).sum(dim=1).mean(dim=(1, 2))


def _unit(x: Tensor) -> Tensor:
    """Each pixel's channels divided by their norm."""
    x = upcast(x)
    # vector_norm takes 0 as its gradient where all channels are 0; that of sqrt(sum(x^2)) would be NaN.
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + EPS)


def pixels_first(x: Tensor) -> Tensor:
    """[B, C, H, W] as dense [B, H, W, C]; no copy of what is channels-last."""
    return x.permute(0, 2, 3, 1).contiguous()


def room_channels_last(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


_fused = FusedOp(
    "tap_distance",
    inputs="Tensor y, Tensor x, Tensor weight, Tensor? mask",
    outputs="Tensor",
    results=1,
    like_forward=lambda y, x, weight, mask: (y.new_empty(y.shape[0], dtype=torch.float32),),
    backward_inputs="Tensor d_out, Tensor y, Tensor x, Tensor weight, Tensor? mask",
    backward_outputs="Tensor",
    like_backward=lambda d_out, y, x, weight, mask: (room_channels_last(y),),
    saved=lambda inputs, outputs: inputs,
    bodies={"triton": triton_body("tap_distance", "tap_distance")},
)


def tap_distance(y: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """The distance of each pair of features; see the module's docstring.

    Raises:
        ValueError: shapes that do not belong together, or another input than y that wants a gradient.
    """
    op = "tap_distance"
    if y.dim() != 4 or 0 in y.shape[1:]:
        raise mistake(op, f"y must be [B, C, H, W] with C, H and W above 0, got {list(y.shape)}")
    for name, other, shape in (("x", x, y.shape), ("weight", weight, y.shape[1:2]), ("mask", mask, y.shape)):
        if other is not None and other.shape != shape:
            raise mistake(op, f"{name} must be {list(shape)}, got {list(other.shape)}")
        if other is not None and other.requires_grad:
            raise mistake(op, f"{name} gets no gradient; detach it")
    # "native" has no body of it, as its docstring says.
    if (body := backend.choose(y) if y.is_cuda or backend.current() == "triton" else "reference") == "reference":
        return tap_distance_ref(y, x, weight, mask)
    return _fused(body, y, x.to(y.dtype), weight, mask)
