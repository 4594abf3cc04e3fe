"""Inception against torch-fidelity's with the same random weights, and the checks of its weight file."""

import hashlib

import pytest
import torch

from unite_fast.errors import UserError
from unite_fast.evaluation.inception import (
    InceptionFeatures,
    inception_shapes,
    load_inception,
    resize_like_tensorflow,
)

# Allowed multiple of torch-fidelity's own float32 error, which is 3e-7 to 6e-7 of the norm; measured: at most 1.07.
SLACK = 2


@pytest.fixture(scope="module")
def network(fidelity) -> InceptionFeatures:
    return InceptionFeatures(fidelity.random_weights(inception_shapes()))


@pytest.mark.parametrize("side", ["32x32", "64x64", "256x256", "299x299", "40x75"])
def test_features_are_those_of_torch_fidelity(network, fidelity, side):
    features = network(fidelity.random_image(*map(int, side.split("x"))))
    for name, actual in (("pool", features.pool), ("logits", features.logits)):
        expected = torch.from_numpy(fidelity.numbers[f"{name}/{side}"]).double()
        error = (actual[0].double() - expected).norm() / expected.norm()
        assert error <= SLACK * float(fidelity.numbers[f"{name}_error/{side}"]), name


def test_shapes_and_dtypes_of_the_features(network, fidelity):
    features = network(fidelity.random_image(32, 32))
    assert features.pool.shape == (1, network.dimension) and features.pool.dtype == torch.float32
    assert features.logits.shape == (1, network.classes) and features.logits.dtype == torch.float32
    with pytest.raises(ValueError, match="uint8"):
        network(torch.zeros(1, 3, 32, 32))


def test_the_resize_samples_at_multiples_of_the_scale():
    """Output i is sampled at i * size / side: the first pixel is exact, and the last ones repeat the edge."""
    x = torch.tensor([[0.0, 10.0], [20.0, 30.0]]).reshape(1, 1, 2, 2)
    expected = [[0, 5, 10, 10], [10, 15, 20, 20], [20, 25, 30, 30], [20, 25, 30, 30]]
    assert resize_like_tensorflow(x, 4)[0, 0].tolist() == expected
    assert torch.equal(resize_like_tensorflow(x, 2), x)


def test_shapes_are_those_of_the_published_file():
    shapes = inception_shapes()
    # 94 convolutions with four vectors of batch normalisation each, and the classifier; counted on torch-fidelity's.
    assert len(shapes) == 94 * 5 + 1
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)


def test_an_error_says_where_missing_weights_come_from():
    with pytest.raises(UserError) as caught:
        load_inception()
    for part in ("--inception", "weights-inception-2015-12-05-6726825d.pth", "torch-fidelity", "UNITE_FAST_INCEPTION"):
        assert part in str(caught.value)


def test_weights_are_checked_and_loaded(tmp_path, monkeypatch, mentions):
    path = tmp_path / "weights.pth"
    # One element for each shape, so that the file is small.
    torch.save({name: torch.ones(1).expand(shape) for name, shape in inception_shapes().items()}, path)
    with pytest.raises(UserError, match=mentions(path, "6726825d", "--inception-sha256")):
        load_inception(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setenv("UNITE_FAST_INCEPTION", str(path))
    assert load_inception(sha256=digest[:8]).source == {"path": str(path), "sha256": digest}
