"""Names in arrays, what was left out, names on one line."""

import os
import sys

import numpy as np
import pytest

from unite_fast.data_pipeline.listing import LeftOut, Names, printable


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


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain \u00e4.jpg", "plain \u00e4.jpg"),
        ("a\nb\tc", "a b c"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("abc\u202egpj.exe", "abc\\u202egpj.exe"),
        (os.fsdecode(b"\xff.png"), "\\xff.png"),
        ("\ud800", "\\ud800"),
    ],
)
def test_a_name_is_printed_on_one_line(text, shown):
    assert printable(text) == shown


def test_what_is_left_out_is_counted_and_named():
    left_out, other = LeftOut(), LeftOut()
    for number in range(5):
        left_out.add("odd", f"a\n{number}")
    other.add("even", "b")
    other.add("odd", "c")
    left_out.merge(other)
    assert left_out.lines() == ["1 even: b", "6 odd: a 0, a 1, a 2, ..."]
