"""Bytes of LPIPS for one image and its reconstruction in bfloat16 with the Triton kernels, summed over `VGG_BLOCKS`.

The convolutions themselves are not counted, nor is what does not grow with the image: weights, and the casts of them.
"""

from math import prod
from typing import NamedTuple

from unite_fast.lpips import VGG_BLOCKS, tap_shapes

HALF = 2
"""Bytes of a bfloat16 number."""
PIXEL_BYTES = 2 * 90 + 42
"""Bytes per pixel before the first convolution: shift, scale, layout and cast of both images, 24 + 24 + 24 + 18;
backward of cast and scale for the reconstruction, 18 + 24."""


class Elements(NamedTuple):
    """Numbers of elements, for one image."""

    convolutions: int
    """Outputs of all convolutions but those before a tap; kernels/bias_relu.py adds their bias."""
    taps: int
    """Outputs of the convolutions before the taps."""
    pooled: int


def elements(image_size: int) -> Elements:
    shapes = tap_shapes(image_size, image_size)
    convolutions = sum((len(block) - 1) * prod(shape) for block, shape in zip(VGG_BLOCKS, shapes, strict=True))
    pooled = sum(channels * (height // 2) * (width // 2) for channels, height, width in shapes[:-1])
    return Elements(convolutions, sum(map(prod, shapes)), pooled)


def lpips_bytes(image_size: int) -> int:
    """Bytes that all operators but the convolutions read and write, forward and backward: every tensor once per
    operator."""
    convolutions, taps, pooled = elements(image_size)
    bias_relu = 2 * 2 * convolutions  # both images: x -> result
    bias_relu += 3 * convolutions  # gradient and result -> gradient
    tap_distance = 2 * taps + 2 * pooled  # y and x -> pooled y and x
    tap_distance += 2 * taps + pooled + taps  # y, x and the gradient of pooled y -> gradient of y
    return HALF * (bias_relu + tap_distance) + PIXEL_BYTES * image_size**2


def lpips_saved(image_size: int) -> int:
    """Bytes kept for backward: the inputs of the reconstruction's convolutions (its image, results of bias_relu, pooled
    features), and of both images what goes into the taps."""
    convolutions, taps, pooled = elements(image_size)
    return HALF * (3 * image_size**2 + convolutions + pooled + 2 * taps)
