"""Published weights: the expected file, and each way in which it can be missing or wrong."""

import hashlib

import pytest
import torch

from unite_fast.errors import UserError
from unite_fast.utils.pretrained import WeightFile, file_sha256

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2), "unused": torch.zeros(1)}
SHAPES = {"a.weight": (2, 3), "a.bias": (2,)}


@pytest.fixture
def path(tmp_path):
    torch.save(TENSORS, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.fixture
def weights(path, monkeypatch):
    """The published file; its settings are called test.path and test.sha256."""
    monkeypatch.delenv("UNITE_FAST_TEST", raising=False)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    size = path.stat().st_size
    return WeightFile("test.path", "test.sha256", "UNITE_FAST_TEST", "the test", "weights of the test", digest, size)


def test_the_named_tensors_are_loaded(weights, path):
    for digest in (weights.sha256, weights.sha256[:8].upper()):
        tensors = weights.load(str(path), digest, SHAPES)
        assert tensors.keys() == SHAPES.keys()
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in SHAPES)
    assert file_sha256(path) == weights.sha256


def test_an_old_file_without_zip_is_loaded(weights, path):
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    assert torch.equal(weights.load(str(path), file_sha256(path), SHAPES)["a.bias"], torch.ones(2))


def test_the_environment_variable_is_read_if_the_setting_is_empty(weights, path, monkeypatch, mentions):
    assert weights.named(str(path)) and not weights.named("")
    monkeypatch.setenv("UNITE_FAST_TEST", str(path))
    assert weights.named("") and weights.path("") == path
    assert weights.load("", weights.sha256, SHAPES).keys() == SHAPES.keys()
    monkeypatch.setenv("UNITE_FAST_TEST", str(path.with_name("nowhere.pth")))
    assert weights.path(str(path)) == path, "the setting wins"
    with pytest.raises(UserError, match=mentions("UNITE_FAST_TEST", path.with_name("nowhere.pth"))):
        weights.path("")


def test_a_tilde_means_the_home_folder(weights, path, monkeypatch):
    monkeypatch.setenv("HOME", str(path.parent))
    assert weights.path("~/weights.pth") == path


def test_a_missing_path_or_file_is_refused(weights, path, mentions):
    with pytest.raises(UserError, match=mentions("test.path", "UNITE_FAST_TEST", "weights of the test", "the test")):
        weights.path("")
    with pytest.raises(UserError, match=mentions("test.path", path.parent)):
        weights.path(str(path.parent))


def test_a_truncated_or_changed_file_is_refused(weights, path, mentions):
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=mentions("test.path", len(whole) - 1, len(whole), "test.sha256")):
        weights.load(str(path), weights.sha256, SHAPES)
    path.write_bytes(whole[:-1] + b"x")
    with pytest.raises(UserError, match=mentions("test.path", file_sha256(path), weights.sha256, "test.sha256")):
        weights.load(str(path), weights.sha256, SHAPES)
    # With another SHA-256, the published size is not checked.
    torch.save(TENSORS | {"more": torch.zeros(50)}, path)
    assert weights.load(str(path), file_sha256(path), SHAPES).keys() == SHAPES.keys()


@pytest.mark.parametrize(
    ("content", "token"),
    [
        (b"no file of torch.save", "weights of the test"),
        ([1, 2], "list"),
        ({"a.weight": torch.zeros(2, 3)}, "a.bias"),
        ({"a.weight": torch.zeros(2, 3), "a.bias": 5}, "a.bias"),
        ({"a.weight": torch.zeros(3, 2), "a.bias": torch.zeros(2)}, "a.weight"),
    ],
)
def test_a_file_with_other_contents_is_refused(weights, path, content, token, mentions):
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=mentions("test.path", path, token)) as caught:
        weights.load(str(path), file_sha256(path), SHAPES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "token"),
    [
        (lambda w: w.to_sparse(), "sparse"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "qint8"),
        (lambda w: w.to("meta"), "meta"),
        (lambda w: w.int(), "int32"),
        (lambda w: w / 0, "finite"),
        (lambda w: [1.0, 2.0], "a.bias"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_values_that_are_no_weights_are_refused(weights, path, change, token, mentions):
    """Also in a file whose SHA-256 the user gives."""
    torch.save(TENSORS | {"a.bias": change(TENSORS["a.bias"])}, path)
    with pytest.raises(UserError, match=mentions("test.path", path, token)):
        weights.load(str(path), file_sha256(path), SHAPES)


def test_a_pickle_that_runs_code_is_refused(weights, path, tmp_path, mentions):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"a.weight": Harmful()}, path)
    with pytest.raises(UserError, match=mentions("test.path", path)):
        weights.load(str(path), file_sha256(path), SHAPES)
    assert not (tmp_path / "harm").exists()


def test_a_file_that_cannot_be_opened_is_named(weights, path, monkeypatch, mentions):
    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("unite_fast.utils.pretrained.file_sha256", fail)
    with pytest.raises(UserError, match=mentions("test.path", path, "Permission denied")):
        weights.load(str(path), weights.sha256, SHAPES)
