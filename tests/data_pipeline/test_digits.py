"""The digits of scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from unite_fast.data_pipeline import open_source
from unite_fast.errors import UserError


def test_the_splits_are_disjoint_and_hold_every_digit():
    train, test = (open_source("digits", None, 8, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert train.class_names == test.class_names == [str(digit) for digit in range(10)]
    rows = [source.read(range(len(source)))[0][:, 0].flatten(1).numpy() for source in (train, test)]
    every = np.rint(load_digits().data * 255 / 16).astype(np.uint8)
    together = np.concatenate(rows)
    np.testing.assert_array_equal(np.unique(together, axis=0), np.unique(every, axis=0))
    assert sorted(map(bytes, together)) == sorted(map(bytes, every))


def test_the_test_split_is_a_fifth_of_every_class_and_fixed():
    first, again = (open_source("digits", "", 8, "test") for _ in range(2))
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert all(count in (35, 36, 37) for count in first.labels.bincount().tolist())


def test_white_is_255():
    images, _ = open_source("digits", None, 8, "train").read(range(1437))
    assert images.unique().tolist() == [round(value * 255 / 16) for value in range(17)]


def test_another_size_is_refused(mentions):
    with pytest.raises(UserError, match=mentions("image_size", 32, 8)):
        open_source("digits", None, 32, "train")
