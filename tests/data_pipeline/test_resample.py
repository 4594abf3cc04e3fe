"""The C++ resizing equals Pillow's bit for bit; its weights sum to one."""

import numpy as np
import pytest
from PIL import Image

from unite_fast.data_pipeline import resample

needs_native = pytest.mark.skipif(
    not resample.native_available(), reason="unite_fast.data_pipeline._resample was not built"
)


def noise(seed, height, width):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def both(image, *region):
    return resample.resize_and_crop(image, *region), resample.reference(image, *region)


@needs_native
@pytest.mark.parametrize("seed", range(40))
def test_it_equals_pillow_bit_for_bit(seed):
    random = np.random.default_rng(seed)
    size = int(random.integers(1, 150))
    # From enlarged 8 times to reduced 5 times.
    height, width = (int(side) for side in random.integers(max(1, size // 8), 5 * size + 2, 2))
    shorter = min(height, width)
    resized_width, resized_height = round(width * size / shorter), round(height * size / shorter)
    left, top = (resized_width - size) // 2, (resized_height - size) // 2
    actual, expected = both(noise(seed, height, width), resized_width, resized_height, left, top, size)
    assert actual.dtype == np.uint8 and actual.shape == (size, size, 3)
    np.testing.assert_array_equal(actual, expected)


@needs_native
@pytest.mark.parametrize(
    "region", [(60, 40, 0, 0, 40), (60, 40, 20, 0, 40), (45, 50, 3, 9, 41), (30, 33, 30 - 7, 33 - 7, 7)]
)
def test_the_square_may_be_anywhere(region):
    actual, expected = both(noise(1, 45, 50), *region)
    np.testing.assert_array_equal(actual, expected)


@needs_native
def test_overshoots_are_clamped():
    """Bicubic interpolation overshoots at edges."""
    pixels = np.zeros((40, 50, 3), np.uint8)
    pixels[:, 20:30], pixels[10:20, :, 1] = 255, 255
    actual, expected = both(Image.fromarray(pixels), 33, 27, 2, 0, 27)
    np.testing.assert_array_equal(actual, expected)
    assert actual.min() == 0 and actual.max() == 255


@needs_native
def test_threads_can_resize_at_once():
    from concurrent.futures import ThreadPoolExecutor

    images = [noise(seed, 90, 120) for seed in range(30)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda image: both(image, 64, 48, 8, 0, 48), images))
    for actual, expected in results:
        np.testing.assert_array_equal(actual, expected)


@needs_native
def test_wrong_weights_are_refused_before_memory_is_read():
    from unite_fast.data_pipeline import _resample

    pixels, out = np.zeros((8, 8, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)
    starts, values = resample.weights(8, 4, 0, 4)
    _resample.resample(pixels, starts, values, starts, values, out)
    for wrong in (starts + 1, starts - 1, starts[:3]):
        with pytest.raises(ValueError):
            _resample.resample(pixels, wrong, values, starts, values, out)
        with pytest.raises(ValueError):
            _resample.resample(pixels, starts, values, wrong, values, out)


@pytest.mark.parametrize("length, resized", [(375, 256), (256, 256), (100, 256), (511, 256), (3, 256), (1, 8)])
def test_weights_sum_to_one(length, resized):
    starts, values = resample.weights(length, resized, 0, resized)
    assert (starts >= 0).all() and (starts + values.shape[1] <= length).all()
    # Each weight is rounded, by at most half a unit.
    assert np.abs(values.sum(1) - 2**22).max() <= values.shape[1] / 2
