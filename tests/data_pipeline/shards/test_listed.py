"""Labels from files: what is a class, and how classes are numbered."""

import os

import numpy as np
import pytest

from unite_fast.data_pipeline.listing import Names
from unite_fast.data_pipeline.shards import listed
from unite_fast.data_pipeline.shards.listed import RawImages, number_classes, parse_label
from unite_fast.data_pipeline.source import UnreadableSample
from unite_fast.data_pipeline.splits import ClassesDiffer
from unite_fast.errors import UserError


@pytest.mark.parametrize(
    "value, label", [(3, 3), (3.0, 3), (" 3\n", 3), ("cat", "cat"), (-1, -1), ("-1", -1), ("3.0", 3), (0, 0)]
)
def test_numbers_and_names_are_classes(value, label):
    assert parse_label(value) == label and type(parse_label(value)) is type(label)


@pytest.mark.parametrize(
    "value", [0.5, "0.5", "-2", float("nan"), float("inf"), True, -2, 10**6, 10**30, "", " ", "9" * 30, [1], {}, None]
)
def test_nothing_else_is_a_class(value):
    with pytest.raises(ValueError):
        parse_label(value)


@pytest.mark.parametrize(
    "text",
    [
        *("1e3", "0x10", "1_0", "1 2", "1,2", "[3]", '"3"', "'cat'", "nan", "NaN", "inf", "9" * 40),
        *(".5", "--1", '{"label": 3}', "[cat]"),
        *("\uff11", "\u0661", "\u00b2", "\u22121", "1\u200b", "\u202ecat", "\ufeffcat", "\ud800", "a\u2028b", "a\nb"),
    ],
)
def test_text_that_only_looks_like_a_number_or_a_name_is_neither(text):
    with pytest.raises(ValueError) as caught:
        parse_label(text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["0-2", "10+", "n01", "tench, Tinca tinca", "\u4e00", "[", "a\u200db", "crane 2", "?"])
def test_odd_names_are_names(text):
    assert parse_label(f" {text} ") == text


def test_classes_are_numbered():
    names, labels = number_classes(["b", "a", "b"], "here")
    assert names == ["a", "b"] and labels.tolist() == [1, 0, 1]
    names, labels = number_classes([2, 0], "here")
    assert names == ["0", "1", "2"] and labels.tolist() == [2, 0]
    assert number_classes([1, 0], "here", ["x", "y"])[0] == ["x", "y"]


def test_numbers_without_a_name_and_mixtures_are_refused(mentions):
    with pytest.raises(UserError, match=mentions("here", 2, "0..1")):
        number_classes([0, 2], "here", ["x", "y"])
    with pytest.raises(UserError, match=mentions("here", "a", 2)):
        number_classes([2, "a"], "here")


@pytest.fixture
def images(tmp_path):
    (tmp_path / "whole").write_bytes(b"0123456789")
    places = np.array([[0, 2, 3], [1, 0, -1], [1, 0, -1]], np.int64)
    os.mkfifo(tmp_path / "pipe.png")
    files = [str(tmp_path / "whole"), str(tmp_path)]
    return RawImages(["x", "y", "z"], np.array([0, 2, 2]), Names(["a", "whole", "pipe.png"]), files, places)


def test_parts_and_whole_files_are_read(images, monkeypatch):
    assert images.read(0) == b"234" and images.read(1) == b"0123456789"
    with pytest.raises(UnreadableSample, match=r"pipe\.png: not a regular file"):
        images.read(2)
    monkeypatch.setattr(listed, "LARGEST_IMAGE", 5)
    with pytest.raises(UnreadableSample, match="too many"):
        images.read(1)


def test_held_out_images_get_the_labels_of_training(images):
    images.conform(["a", "x", "z"], "val", "train")
    assert images.class_names == ["a", "x", "z"] and images.labels.tolist() == [1, 2, 2]
    with pytest.raises(ClassesDiffer):
        images.conform(["a", "z"], "val", "train")
