"""tap_distance: all of LPIPS after one tap of VGG16. It has no C++ backend: on a CPU, the convolutions before it take
most of the time."""

from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unite_fast.kernels import backend
from unite_fast.kernels.fused_op import FusedOp, triton_backend
from unite_fast.kernels.registry import register
from unite_fast.kernels.tensors import argument_error, empty_channels_last, upcast

EPS = 1e-10


class Tap(NamedTuple):
    distance: Tensor
    """float32 [B]; float64 for float64."""
    y: Tensor
    """The features of y after 2x2 max pooling, [B, C, H // 2, W // 2] in y's dtype; empty without pooling."""
    x: Tensor
    """The same of x, without a gradient."""


def tap_distance_ref(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    philox=None,
    stream: int = 0,
    draw: int = 0,
    pool: bool = True,
) -> Tap:
    features_y, features_x = _features(y, bias), _features(x, bias)
    difference = (_unit(features_x) - _unit(features_y)).square()
    if philox is not None:
        difference = difference * dropout_mask(philox, stream, draw, y.shape[1:])
    distance = (difference * weight[:, None, None]).sum(dim=1).mean(dim=(1, 2))
    if not pool:
        return Tap(distance, y.new_empty(0), y.new_empty(0))
    return Tap(distance, *(F.max_pool2d(features, 2).to(y.dtype) for features in (features_y, features_x)))


def _features(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else torch.relu(upcast(x) + upcast(bias)[:, None, None])


def _unit(x: Tensor) -> Tensor:
    """Each pixel's channels divided by their norm."""
    x = upcast(x)
    # Where all channels are 0, the gradient of vector_norm is 0; that of sqrt(sum(x^2)) would be NaN.
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + EPS)


def dropout_mask(philox, stream: int, draw: int, shape: Sequence[int]) -> Tensor:
    """The mask of dropout with p = 1/2: 0 or 1/(1-p) = 2, each with probability 1/2.

    One random bit decides one element: word `(h W + w) C/32 + j` of a draw holds the channels 32 j to 32 j + 31 of
    pixel (h, w), lowest bit first. So the channels of a pixel share words, and a 256 x 256 image costs 0.25 M words
    instead of 8 M.

    Args:
        philox: a `unite_fast.randomness.Philox` with the positions of b samples.
        stream, draw: which words of `philox`.
        shape: (C, H, W), C a multiple of 32.

    Returns:
        uint8 [b, C, H, W], channels-last like the features.
    """
    c, h, w = shape
    drawn = philox.words(stream, (h * w * c // 32,), draw)
    # Through bytes: 32 int64 per word would take eight times the memory of the mask.
    octets = ((drawn[..., None] >> torch.arange(0, 32, 8, device=drawn.device)) & 0xFF).to(torch.uint8)
    keep = (octets[..., None] >> torch.arange(8, dtype=torch.uint8, device=drawn.device)) & 1
    return (2 * keep).view(-1, h, w, c).permute(0, 3, 1, 2)


def _fake_forward(y, x, weight, bias, positions, seed_low, seed_high, step, stream, draw, pool):
    height, width = y.shape[2:]
    # An operator cannot return None, so without pooling these are empty.
    pooled = [empty_channels_last(y, height // 2, width // 2) if pool else y.new_empty(0) for _ in range(2)]
    return y.new_empty(y.shape[0], dtype=torch.float32), *pooled


def _fake_backward(
    d_distance, d_pooled_y, d_pooled_x, y, x, weight, bias, positions, seed_low, seed_high, step, stream, draw
):
    return (empty_channels_last(y, *y.shape[2:]),)


_KEYS = "Tensor? positions, int seed_low, int seed_high, int step, int stream, int draw"

tap_distance_op = FusedOp(
    "tap_distance",
    inputs=f"Tensor y, Tensor x, Tensor weight, Tensor? bias, {_KEYS}, bool pool",
    outputs=3,
    results=3,
    fake_forward=_fake_forward,
    backward_inputs="Tensor? d_distance, Tensor? d_pooled_y, Tensor? d_pooled_x, Tensor y, Tensor x, Tensor weight, "
    f"Tensor? bias, {_KEYS}",
    backward_outputs=1,
    fake_backward=_fake_backward,
    saved=lambda inputs, outputs: inputs[:-1],
    backends={"triton": triton_backend("tap_distance")},
)


def tap_distance(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    philox=None,
    stream: int = 0,
    draw: int = 0,
    pool: bool = True,
) -> Tap:
    """The distance of two images' features after one tap of VGG16, a term of LPIPS, and the features after the 2x2 max
    pooling that follows the tap.

        y_c = relu(y_c + bias_c), the same for x
        d = mean over h and w of sum over c of  weight_c m_chw (x_chw / (|x_hw| + eps) - y_chw / (|y_hw| + eps))^2

    |x_hw| is the norm over the channels of a pixel; where it is 0, its gradient is 0. m is 1, or the mask of
    `dropout_mask`, which the Triton backend draws in its kernels. The window's first maximum gets the gradient of a
    pooled feature; PyTorch treats NaN the same way. All arithmetic is float32. Source: Zhang et al., arXiv 1801.03924,
    equation 1.

    Args:
        y: [B, C, H, W], the only argument with a gradient: of d, and of the pooled features.
        x: [B, C, H, W].
        weight: [C].
        bias: [C], of the convolution before the tap. None: y and x are features already.
        philox: for dropout, a `unite_fast.randomness.Philox` with the positions of the B samples. C must then be a
            multiple of 32.
        stream, draw: the words of `philox` that are the mask.
        pool: whether to return pooled features; then H and W are at least 2.

    Raises:
        ValueError: shapes that do not match, seed or step out of range, or an argument other than y that requires a
            gradient.
    """
    _check(y, x, weight, bias, philox, pool)
    if not is_fused(y):
        return tap_distance_ref(y, x, weight, bias, philox, stream, draw, pool)
    inputs = _op_inputs(y, x, weight, bias, philox, stream, draw, pool)
    distance, pooled_y, pooled_x = tap_distance_op("triton", *inputs)
    # Autograd takes each result of an op for a function of y.
    return Tap(distance, pooled_y, pooled_x.detach())


def is_fused(y: Tensor) -> bool:
    """Whether y goes to the Triton backend: this op has no C++, so on a CPU the backend "native" runs the reference."""
    return (y.is_cuda or backend.current() == "triton") and backend.choose(y) == "triton"


def _op_inputs(y, x, weight, bias=None, philox=None, stream=0, draw=0, pool=True) -> tuple:
    keys = (None, 0, 0, 0)
    if philox is not None:
        # The integers of an operator schema are signed 64-bit numbers, too small for the seed.
        keys = philox.positions, philox.seed & 0xFFFFFFFF, philox.seed >> 32, philox.step
    return y, x.to(y.dtype), weight, bias, *keys, int(stream), draw, pool


def _check(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, philox, pool: bool) -> None:
    op = "tap_distance"
    if y.dim() != 4 or 0 in y.shape[1:] or (pool and min(y.shape[2:]) < 2):
        least = "H and W above 1" if pool else "H and W above 0"
        raise argument_error(op, f"y must be [B, C, H, W] with C above 0, {least}, got {list(y.shape)}")
    for name, other, shape in (("x", x, y.shape), ("weight", weight, y.shape[1:2]), ("bias", bias, y.shape[1:2])):
        if other is not None and other.shape != shape:
            raise argument_error(op, f"{name} must be {list(shape)}, got {list(other.shape)}")
        if other is not None and other.requires_grad:
            raise argument_error(op, f"{name} gets no gradient; detach it")
    if philox is None:
        return
    positions = philox.positions
    if positions.shape != y.shape[:1] or positions.dtype != torch.int64 or positions.device != y.device:
        got = f"{positions.dtype} {list(positions.shape)} on {positions.device}"
        raise argument_error(op, f"the positions of philox must be int64 [{len(y)}] on {y.device}, got {got}")
    if not (0 <= philox.seed < 2**64 and 0 <= philox.step < 2**32):
        raise argument_error(op, f"seed {philox.seed} must be in [0, 2**64) and step {philox.step} in [0, 2**32)")
    if y.shape[1] % 32 != 0:
        raise argument_error(op, f"dropout needs a multiple of 32 channels, got {y.shape[1]}")


class Keys(NamedTuple):
    """The fields of `unite_fast.randomness.Philox`, for the example: this package must not import that module."""

    seed: int
    step: int
    positions: Tensor


def _example(size, new):
    """Features with `size.width` channels and about `size.tokens` pixels, as nearly square as they can be."""
    height = isqrt(size.tokens)
    shape = size.batch, size.width, height, size.tokens // height
    y, x = (new(*shape, dtype=size.other).to(memory_format=torch.channels_last) for _ in range(2))
    keys = None
    if size.width % 32 == 0:
        keys = Keys(seed=2**33 + 1, step=3, positions=torch.arange(size.batch).to(y.device))
    weight, bias = new(size.width, dtype=size.weights), new(size.width, dtype=size.weights)
    return {"y": y, "x": x, "weight": weight, "bias": bias, "philox": keys, "stream": 9}


register(
    tap_distance,
    tap_distance_ref,
    tap_distance_op,
    example=_example,
    part="lpips",
    op_inputs=_op_inputs,
)
