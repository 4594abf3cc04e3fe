"""Names in arrays, and what was left out."""

import os
import sys

import numpy as np
import pytest

from unite_fast.data_pipeline.listing import LeftOut, Names


def test_names_are_as_given():
    words = ["a/b.jpg", "", "\u00e4/\u4e16.png", os.fsdecode(b"\xff.jpg"), "x" * 300]
    names = Names(words)
    assert list(names) == words and len(names) == 5 and names[-1] == words[-1]
    assert list(Names.join([names, Names(), Names(["z"])])) == [*words, "z"]
    assert list(Names.join([])) == list(Names()) == []
    assert list(names.take(np.array([4, 0]))) == [words[4], words[0]]
    with pytest.raises(IndexError):
        names[5]


def test_names_take_few_bytes():
    names = Names(f"n01440764/n01440764_{number:05d}.JPEG" for number in range(1000))
    arrays = sum(value.nbytes for value in vars(names).values())
    assert arrays == 1000 * (30 + 8) and sys.getsizeof(names) < 100


def test_what_is_left_out_is_counted_and_named():
    left_out, other = LeftOut(), LeftOut()
    for number in range(5):
        left_out.add("odd", f"a\n{number}")
    other.add("even", "b")
    other.add("odd", "c")
    left_out.merge(other)
    assert left_out.lines() == ["1 even: b", "6 odd: a 0, a 1, a 2, ..."]
