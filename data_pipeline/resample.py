"""Bicubic resizing of a picture of which a square is wanted: by Pillow, or with the same pixels by C++."""

import functools

import numpy as np
from PIL import Image

try:
    from unite_fast.data_pipeline import _resample
except ImportError:
    _resample = None

_BITS = 22
"""Of a weight's fraction, in Pillow and in csrc/resample.cpp."""


def native_available() -> bool:
    return _resample is not None


def resize_and_crop(image: Image.Image, width: int, height: int, left: int, top: int, size: int) -> np.ndarray:
    """The square of `size` pixels at (left, top) of an RGB picture resized to width x height: uint8 [size, size, 3].

    First along the rows, then along the columns, each rounded to 8 bits, which is what Pillow does in one call up to
    version 12; from 13 on it begins with the columns of some tall pictures, and that changes a tenth of the values by
    one. In two calls every version gives the pixels that ADM had.
    """
    if _resample is None:
        return reference(image, width, height, left, top, size)
    out = np.empty((size, size, 3), np.uint8)
    along_rows = weights(image.width, width, left, size)
    along_columns = weights(image.height, height, top, size)
    _resample.resample(np.asarray(image), *along_rows, *along_columns, out)
    return out


def reference(image: Image.Image, width: int, height: int, left: int, top: int, size: int) -> np.ndarray:
    """The same by Pillow: what the C++ answers to, bit for bit."""
    # The columns that are not wanted need not be resized.
    wide = image.resize((width, image.height), Image.Resampling.BICUBIC).crop((left, 0, left + size, image.height))
    return np.array(wide.resize((size, height), Image.Resampling.BICUBIC).crop((0, top, size, top + size)))


@functools.lru_cache(maxsize=1024)
def weights(length: int, resized: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """How pixels first..first + count of a side of `length`, resized to `resized`, are made of the old ones.

    Returns:
        starts int32 [count] and weights int32 [count, taps] with 22 bits of fraction: new pixel i is the sum over k of
        weights[i, k] times old pixel starts[i] + k. Where the filter reaches over the edge it is cut and normalised.
    """
    ratio = length / resized
    stretch = max(ratio, 1.0)
    centers = (np.arange(first, first + count) + 0.5) * ratio
    begin = np.maximum((centers - 2 * stretch + 0.5).astype(np.int64), 0)
    end = np.minimum((centers + 2 * stretch + 0.5).astype(np.int64), length)
    taps = int((end - begin).max())
    starts = np.minimum(begin, length - taps)
    places = starts[:, None] + np.arange(taps)
    values = _bicubic((places - centers[:, None] + 0.5) * (1 / stretch))
    values[(places < begin[:, None]) | (places >= end[:, None])] = 0.0
    # Summed from left to right and rounded half away from zero, or some weight would be off by its last bit.
    values /= values.cumsum(1)[:, -1:]
    fixed = values * 2**_BITS
    return starts.astype(np.int32), np.trunc(fixed + np.copysign(0.5, fixed)).astype(np.int32)


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
