"""Names in arrays, and what was left out."""

import os
import sys
import time

import numpy as np
import pytest

from unite_fast.data_pipeline.listing import LeftOut, Names, alike, is_clutter


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


def test_names_that_look_alike():
    assert alike(["cat", "dog", "cats", "c at s 2"]) == alike([]) == []
    for pair in (["cat", "CAT"], ["caf\u00e9", "cafe\u0301"], ["a b", "ab"], ["2", "\uff12"], ["a\udcff", "A\udcff"]):
        (note,) = alike(["x", *pair])
        assert note.isascii() and note.isprintable()


def test_a_million_numbers_are_compared_at_once():
    start = time.perf_counter()
    assert alike(list(map(str, range(1_000_000)))) == []
    assert time.perf_counter() - start < 5


def test_folders_of_a_system():
    assert is_clutter("__MACOSX") and is_clutter("@eadir") and is_clutter("lost+found")
    assert not is_clutter("lost") and not is_clutter("MACOSX") and not is_clutter("cat")
