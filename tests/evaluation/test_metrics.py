"""Metrics of features against torch-fidelity's on the same features; metrics of pixels against their definitions."""

import numpy as np
import pytest
import scipy.ndimage
import torch

from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError
from unite_fast.evaluation import metrics


@pytest.fixture(scope="module")
def features(fidelity):
    return fidelity.random_features()


def test_inception_score_equals_torch_fidelitys(fidelity, features):
    mean, deviation = metrics.inception_score(features[2])
    assert mean == pytest.approx(float(fidelity.numbers["inception_score_mean"]), rel=1e-12)
    assert deviation == pytest.approx(float(fidelity.numbers["inception_score_std"]), rel=1e-12)


def test_inception_score_of_known_distributions(mentions):
    sure = 1000 * torch.eye(10).repeat(20, 1)
    assert metrics.inception_score(sure) == pytest.approx((10, 0), abs=1e-9)
    assert metrics.inception_score(torch.zeros(50, 10)) == pytest.approx((1, 0), abs=1e-12)
    with pytest.raises(UserError, match=mentions("Inception Score", 10, 9)):
        metrics.inception_score(torch.zeros(9, 3))


def test_inception_score_from_parts_equals_that_of_the_whole(features):
    logits = features[2]
    split = torch.arange(len(logits)) % 4
    whole, parts = metrics.InceptionScore(7, splits=4), metrics.InceptionScore(7, splits=4)
    whole.update(logits, split)
    for part in torch.randperm(len(logits), generator=torch.Generator().manual_seed(0)).split(31):
        parts.update(logits[part], split[part])
    parts.all_reduce(Ranks())
    assert parts.result() == pytest.approx(whole.result(), rel=1e-12)


def test_kid_equals_torch_fidelitys(fidelity, features):
    subsets, size = fidelity.KID.values()
    mean, deviation = metrics.kid(*features[:2], subsets, size)
    assert mean == pytest.approx(float(fidelity.numbers["kernel_inception_distance_mean"]), rel=1e-9)
    assert deviation == pytest.approx(float(fidelity.numbers["kernel_inception_distance_std"]), rel=1e-9)
    # Another seed, other subsets.
    assert metrics.kid(*features[:2], subsets, size, seed=0)[0] != mean


def test_kid_uses_100_subsets_of_1000_as_the_usual_tools_do(monkeypatch):
    sizes = []
    monkeypatch.setattr(metrics, "_mmd", lambda x, y: sizes.append((len(x), len(y))) or torch.tensor(0.0))
    metrics.kid(torch.zeros(1500, 2), torch.zeros(1200, 2))
    assert sizes == [(1000, 1000)] * 100


def test_kid_by_its_definition(mentions):
    x, y = torch.tensor([[1.0, 0], [0, 2], [1, 1]]), torch.tensor([[0.0, 1], [3, 0], [1, 2]])

    def kernel(a, b):
        return (float(a @ b) / 2 + 1) ** 3

    def off_diagonal(z):
        return sum(kernel(z[i], z[j]) for i in range(3) for j in range(3) if i != j) / 6

    cross = sum(kernel(a, b) for a in x for b in y) / 9
    expected = off_diagonal(x) + off_diagonal(y) - 2 * cross
    assert metrics.kid(x, y, subsets=4, size=3) == pytest.approx((expected, 0), rel=1e-12, abs=1e-12)
    for size in (1, 4):
        with pytest.raises(UserError, match=mentions("KID", size, "3 and 3")):
            metrics.kid(x, y, size=size)


@pytest.mark.parametrize("block", [metrics._BLOCK, 10], ids=["one block", "many"])
def test_precision_and_recall_equal_torch_fidelitys(fidelity, features, monkeypatch, block):
    monkeypatch.setattr(metrics, "_BLOCK", block)
    precision, recall = metrics.precision_recall(*features[:2])
    # torch-fidelity counts in float32.
    assert precision == pytest.approx(float(fidelity.numbers["precision"]), rel=1e-6)
    assert recall == pytest.approx(float(fidelity.numbers["recall"]), rel=1e-6)


def test_precision_and_recall_of_known_sets(mentions):
    line = torch.arange(10.0)[:, None]
    assert metrics.precision_recall(line, line) == (1, 1)
    assert metrics.precision_recall(line + 1000, line) == (0, 0)
    # All generated samples lie among the real ones, and their balls reach no real one beyond 4.
    clumped = torch.linspace(0, 1, 10)[:, None]
    assert metrics.precision_recall(clumped, line) == (1, 0.2)
    with pytest.raises(UserError, match=mentions("precision", "3 and 10")):
        metrics.precision_recall(line[:3], line)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 24, 24), generator=generator, dtype=torch.uint8)
    smooth = scipy.ndimage.gaussian_filter(images.numpy(), (0, 0, 1, 1))
    return images, torch.from_numpy(smooth)


def test_pixel_errors_by_their_definitions(pair):
    a, b = (x.numpy().astype(np.float64) / 255 for x in pair)
    np.testing.assert_allclose(metrics.l1(*pair), np.abs(a - b).mean((1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(metrics.psnr(*pair), -10 * np.log10(((a - b) ** 2).mean((1, 2, 3))), rtol=1e-12)
    black, grey = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)
    assert metrics.psnr(black, grey).item() == pytest.approx(20 * np.log10(5))
    both = metrics.psnr(torch.cat((black, grey)), torch.cat((grey, grey)))
    assert both.dtype == torch.float64 and both.isfinite().tolist() == [True, False]


def test_ssim_by_scipys_gaussian(pair, mentions):
    def local(image: np.ndarray) -> np.ndarray:
        # 3.5 sigma is the 11 x 11 window; the border, where it leaves the image, is cut off.
        return scipy.ndimage.gaussian_filter(image, 1.5, truncate=3.5)[5:-5, 5:-5]

    expected = []
    for x, y in zip(*(z.numpy().astype(np.float64) / 255 for z in pair), strict=True):
        planes = []
        for a, b in zip(x, y, strict=True):
            mean_a, mean_b = local(a), local(b)
            var_a, var_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
            covariance = local(a * b) - mean_a * mean_b
            planes.append(
                ((2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4))
                / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))
            )
        expected.append(np.mean(planes))
    np.testing.assert_allclose(metrics.ssim(*pair), expected, rtol=1e-10)
    assert metrics.ssim(pair[0], pair[0]).tolist() == pytest.approx([1] * 3, abs=1e-12)
    with pytest.raises(UserError, match=mentions("SSIM", 11, "[10, 24]")):
        metrics.ssim(*(z[:, :, :10] for z in pair))
