"""Pixel components against an independent decomposition; the classifier on images with known labels."""

import numpy as np
import pytest
import torch
from PIL import Image

from unite_fast.data_pipeline import open_source
from unite_fast.errors import UserError
from unite_fast.evaluation.pixel_features import Classifier, PixelFeatures, fit_pixels, read_evenly


@pytest.fixture(scope="module")
def digits():
    train, test = (open_source("digits", "", 8, split) for split in ("train", "test"))
    return train.read(range(len(train))), test.read(range(len(test)))


@pytest.mark.parametrize("n", [1437, 100], ids=["more images than pixels", "fewer"])
def test_components_are_the_principal_ones(digits, n):
    images = digits[0][0][:n]
    features = fit_pixels(images)
    pixels = images.flatten(1).numpy() / 255
    _, singular, directions = np.linalg.svd(pixels - pixels.mean(0), full_matrices=False)
    share = np.cumsum(singular**2) / (singular**2).sum()
    k = int(np.searchsorted(share, 0.99)) + 1
    assert features.dimension == k < 64 and features.image_size == 8
    assert features.source["fitted_to"] == n
    assert features.source["share_of_variance"] == pytest.approx(share[k - 1])
    # Equal up to sign. The last components differ little in variance from the omitted ones: 3e-5 measured.
    overlap = np.abs(features.components.numpy() @ directions[:k].T)
    np.testing.assert_allclose(np.diag(overlap), 1, atol=1e-4)
    pool = features(images).pool
    assert features(images).logits is None and pool.dtype == torch.float32
    np.testing.assert_allclose(pool.numpy().var(0), singular[:k] ** 2 / n, rtol=1e-3)


def test_the_number_of_components_is_bounded():
    noise = torch.randint(0, 256, (300, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert fit_pixels(noise).dimension == 64


def test_the_same_components_give_the_same_features(digits):
    features = fit_pixels(digits[0][0])
    copy = PixelFeatures(features.basis)
    assert torch.equal(copy(digits[1][0]).pool, features(digits[1][0]).pool)


def test_images_of_another_size_and_equal_images_are_refused(digits, mentions):
    with pytest.raises(UserError, match=mentions(8, 16)):
        fit_pixels(digits[0][0])(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(UserError, match=mentions("pixel", "same")):
        fit_pixels(digits[0][0][:1].repeat(3, 1, 1, 1))


def test_the_classifier_recognises_digits(digits):
    classifier = Classifier(*digits[0])
    images, labels = digits[1]
    # Measured on held-out digits: 358 of 360.
    assert classifier.count_correct(images, labels) >= 0.98 * len(labels)
    assert classifier.count_correct(images, (labels + 1) % 10) < 0.02 * len(labels)


@pytest.fixture
def sorted_images(tmp_path):
    for kind, colour in (("a", 30), ("b", 120), ("c", 210)):
        (tmp_path / kind).mkdir()
        for i in range(8):
            Image.fromarray(np.full((8, 8, 3), colour + i, np.uint8)).save(tmp_path / kind / f"{i}.png")
    return tmp_path


def test_an_even_selection_of_a_sorted_source_has_all_classes(sorted_images):
    source = open_source("folder", str(sorted_images), 8, "train")
    images, labels = read_evenly(source, 6)
    assert len(images) == 6
    assert labels.bincount().tolist() == [2, 2, 2]
    assert read_evenly(source, 100)[1].bincount().tolist() == [8, 8, 8]


def test_broken_images_are_left_out(sorted_images):
    (sorted_images / "b" / "3.png").write_bytes(b"no picture")
    images, labels = read_evenly(open_source("folder", str(sorted_images), 8, "train"), 100)
    assert len(images) == 23
    assert labels.bincount().tolist() == [8, 7, 8]
