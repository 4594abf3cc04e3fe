"""Bicubic resizing of an image, followed by a square crop: in C++, or in Pillow with the same pixels."""

import functools

import numpy as np
from PIL import Image

try:
    # The C++ extension, which a type checker does not see.
    from unite_fast.data_pipeline import _resample  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:
    _resample = None

_BITS = 22
"""Fraction bits of a fixed-point weight, as in Pillow and csrc/resample.cpp."""


def native_available() -> bool:
    return _resample is not None


def resize_and_crop(image: Image.Image, width: int, height: int, left: int, top: int, size: int) -> np.ndarray:
    """Resize an RGB image to width x height, then cut out the square at (left, top): uint8 [size, size, 3].

    Rows first, then columns, each rounded to 8 bits. Pillow up to version 12 does the same in one call; since version
    13 it resizes some tall images columns first, which changes a tenth of the values by one. Two calls give the pixels
    of ADM's loader in every version.
    """
    if _resample is None:
        return reference(image, width, height, left, top, size)
    out = np.empty((size, size, 3), np.uint8)
    along_rows = weights(image.width, width, left, size)
    along_columns = weights(image.height, height, top, size)
    _resample.resample(np.asarray(image), *along_rows, *along_columns, out)
    return out


def reference(image: Image.Image, width: int, height: int, left: int, top: int, size: int) -> np.ndarray:
    """The same in Pillow; the C++ code must match it bit for bit."""
    # Drop the columns outside the crop before resizing along them.
    wide = image.resize((width, image.height), Image.Resampling.BICUBIC).crop((left, 0, left + size, image.height))
    return np.array(wide.resize((size, height), Image.Resampling.BICUBIC).crop((0, top, size, top + size)))


@functools.lru_cache(maxsize=1024)
def weights(length: int, resized: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The bicubic filter for pixels first..first + count of a side that is resized from `length` to `resized` pixels.

    Returns:
        starts int32 [count] and weights int32 [count, taps] with 22 fraction bits: new pixel i is the sum over k of
        weights[i, k] times old pixel starts[i] + k. At the edges the filter is truncated and renormalised.
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
    # Sum from left to right and round half away from zero, as Pillow does; otherwise the last bit of a weight differs.
    values /= values.cumsum(1)[:, -1:]
    fixed = values * 2**_BITS
    return starts.astype(np.int32), np.trunc(fixed + np.copysign(0.5, fixed)).astype(np.int32)


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
