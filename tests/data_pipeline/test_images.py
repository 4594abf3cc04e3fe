"""The centre crop against the same filters in numpy, and conversion of every mode to RGB."""

import warnings

import numpy as np
import pytest
from PIL import Image

from unite_fast.data_pipeline.images import adm_center_crop, crop_region, to_rgb


def box(x):
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def bicubic(x):
    """Keys' cubic convolution kernel with a = -1/2."""
    x = np.abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * (x**3 - 5 * x**2 + 8 * x - 4), 0.0))


def resize_rows(pixels, size, kernel, support):
    """Resample axis 0 with the kernel stretched to the output's spacing, rounded to 8 bits."""
    length = len(pixels)
    if length == size:
        return pixels
    ratio = length / size
    stretch = max(ratio, 1.0)
    centers = (np.arange(size) + 0.5) * ratio
    places = np.arange(length) + 0.5
    weights = kernel((places[None] - centers[:, None]) / stretch)
    # A filter reads whole pixels, those whose centres are within its support.
    first = np.maximum((centers - support * stretch + 0.5).astype(int), 0)
    last = np.minimum((centers + support * stretch + 0.5).astype(int), length)
    inside = (np.arange(length) >= first[:, None]) & (np.arange(length) < last[:, None])
    weights = np.where(inside, weights, 0.0)
    weights /= weights.sum(1, keepdims=True)
    return np.floor(np.clip(np.tensordot(weights, pixels, axes=1), 0, 255) + 0.5)


def resize(pixels, height, width, kernel, support):
    wide = resize_rows(pixels.transpose(1, 0, 2), width, kernel, support).transpose(1, 0, 2)
    return resize_rows(wide, height, kernel, support)


def crop_by_numpy(pixels, size):
    pixels = pixels.astype(np.float64)
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = resize(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, box, 0.5)
    height, width = pixels.shape[:2]
    if height < width:
        pixels = resize(pixels, size, round(width * size / height), bicubic, 2.0)
    else:
        pixels = resize(pixels, round(height * size / width), size, bicubic, 2.0)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def noise(height, width, channels=3):
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, channels), dtype=np.uint8)


SIZES = [(64, 64), (32, 32), (32, 45), (63, 40), (65, 131), (200, 97), (129, 128), (300, 64), (20, 30), (31, 200)]


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("size", [32, 24])
def test_the_crop_agrees_with_the_filters_in_numpy(height, width, size):
    pixels = noise(height, width)
    actual = adm_center_crop(Image.fromarray(pixels), size)
    assert actual.dtype == np.uint8
    assert actual.shape == (size, size, 3)
    # Pillow's weights have 22 fractional bits, so a value near a half may round the other way. If more than a few
    # differ, the passes ran in the other order, as in Pillow 13 at some of these sizes.
    difference = np.abs(actual - crop_by_numpy(pixels, size))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_a_square_of_the_right_size_is_unchanged():
    pixels = noise(32, 32)
    np.testing.assert_array_equal(adm_center_crop(Image.fromarray(pixels), 32), pixels)


def test_twice_the_size_is_averaged_two_by_two():
    pixels = noise(64, 64) // 4 * 4  # so that means of means need no rounding
    means = pixels.reshape(32, 2, 32, 2, 3).astype(float).mean((1, 3))
    assert np.abs(adm_center_crop(Image.fromarray(pixels), 32) - means).max() <= 1


@pytest.mark.parametrize("height, width, top, left", [(32, 37, 0, 2), (32, 36, 0, 2), (41, 32, 4, 0)])
def test_offsets_of_the_crop_round_down(height, width, top, left):
    pixels = noise(height, width)
    actual = adm_center_crop(Image.fromarray(pixels), 32)
    np.testing.assert_array_equal(actual, pixels[top : top + 32, left : left + 32])


@pytest.mark.parametrize("height, width", SIZES)
def test_one_colour_stays_one_colour(height, width):
    picture = Image.new("RGB", (width, height), (3, 100, 250))
    assert (adm_center_crop(picture, 32) == (3, 100, 250)).all()


def test_mirror_images_have_mirrored_crops():
    pixels = noise(100, 100)
    plain = adm_center_crop(Image.fromarray(pixels), 32)
    mirrored = adm_center_crop(Image.fromarray(pixels[:, ::-1].copy()), 32)
    assert np.abs(mirrored[:, ::-1].astype(int) - plain).max() <= 1


def test_a_long_and_narrow_image_is_refused_before_it_is_resized(mentions):
    with pytest.raises(ValueError, match=mentions(25_600_000, 256)):
        adm_center_crop(Image.new("L", (100_000, 1)), 256)


def test_16_bit_grey_keeps_its_high_byte():
    grey = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    expected = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    for picture in (Image.fromarray(grey), Image.fromarray(grey.astype(np.int32))):
        assert picture.mode in ("I;16", "I")
        np.testing.assert_array_equal(np.asarray(to_rgb(picture)), expected)


def test_a_transparent_palette_keeps_its_colours_without_a_warning():
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8) % 4
    picture = Image.frombytes("P", (8, 8), indices.tobytes())
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]], dtype=np.uint8)
    picture.putpalette(colours.tobytes())
    picture.info["transparency"] = bytes((0, 128, 255, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = np.asarray(to_rgb(picture))
    np.testing.assert_array_equal(actual, colours[indices])


def test_other_modes_become_rgb():
    rgba = noise(8, 8, 4)
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(rgba))), rgba[..., :3])
    grey = noise(8, 8)[..., 0]
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(grey))), np.stack([grey] * 3, -1))
    two = Image.fromarray(grey > 127)
    assert two.mode == "1"
    np.testing.assert_array_equal(np.asarray(to_rgb(two))[..., 1], (grey > 127) * 255)
    cmyk = np.asarray(to_rgb(Image.new("CMYK", (4, 4), (0, 255, 255, 0))))
    assert (cmyk == (255, 0, 0)).all()


@pytest.mark.parametrize("height, width", SIZES)
def test_the_region_is_that_of_the_crop(height, width):
    top, left, bottom, right = crop_region(width, height, 32)
    assert 0 <= top < bottom <= height + 1e-9 and 0 <= left < right <= width + 1e-9
    # A ramp along each axis: the mean of the crop is the middle of the region.
    ramps = np.zeros((height, width, 3), np.uint8)
    ramps[..., 0] = (np.arange(height) * 250 // height)[:, None]
    ramps[..., 1] = np.arange(width) * 250 // width
    means = adm_center_crop(Image.fromarray(ramps), 32).astype(float).mean((0, 1))
    assert abs(means[0] - ((top + bottom) / 2 / height * 250 - 125 / height - 0.5)) < 1.5 + 125 / height
    assert abs(means[1] - ((left + right) / 2 / width * 250 - 125 / width - 0.5)) < 1.5 + 125 / width
