"""The C++ extension: whether it can be used, and its Philox words against unite_fast/randomness.py, bit by bit."""

import re

import pytest
import torch

from unite_fast.kernels import native
from unite_fast.randomness import Philox, Stream

needs_native = pytest.mark.skipif(not native.available(), reason=native.reason() or "built")

LAST_STREAM = max(Stream)


def test_availability_and_reason_agree():
    assert native.available() == (native.reason() == "")


@pytest.mark.skipif(native.available(), reason="the extension is built")
def test_a_missing_extension_is_an_error_that_says_why():
    with pytest.raises(RuntimeError, match=re.escape(native.reason())):
        native.philox_words(0, 0, 0, 0, torch.arange(2), 4)


@needs_native
def test_a_build_from_other_sources_is_missing_and_warns(monkeypatch):
    """Otherwise, after an edit of C++, `auto` would silently train on the reference."""
    monkeypatch.setattr(native._native, "sources", "of another build")
    with pytest.warns(UserWarning, match=re.escape("pip install -e . --no-deps")) as warnings:
        assert native._why_missing() == str(warnings[0].message)


@needs_native
def test_philox4x32_gives_the_published_answer():
    """The all-zeros vector of Random123's known answers, which are independent of this project."""
    words = native.philox_words(0, 0, 0, 0, torch.zeros(1, dtype=torch.int64), 4)
    assert words.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


@needs_native
@pytest.mark.parametrize("seed", [0, 1234, 2**32, 2**64 - 1])
@pytest.mark.parametrize("step", [0, 2**32 - 1])
@pytest.mark.parametrize("elements", [0, 1, 3, 4, 5, 123 * 5])
def test_words_equal_the_reference(seed, step, elements):
    positions = torch.tensor([0, 1, 7, 2**31, 2**32 - 1])
    expected = Philox(seed, step, positions).words(LAST_STREAM, (elements,), draw=2**16 - 1)
    actual = native.philox_words(seed, step, LAST_STREAM, 2**16 - 1, positions, elements)
    assert actual.dtype == torch.int64
    assert torch.equal(actual, expected)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_words(threads):
    """Large enough to run in parallel, with an odd number of samples to split."""
    positions = torch.arange(5, 18)
    expected = Philox(99, 3, positions).words(Stream.FLOW_NOISE, (257, 33))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = native.philox_words(99, 3, Stream.FLOW_NOISE, 0, positions, 257 * 33)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(actual.reshape(expected.shape), expected)


@needs_native
@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same_normals(threads):
    positions, before = torch.arange(5, 18), torch.get_num_threads()
    normals = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            normals.append(native.philox_normals(99, 3, Stream.FLOW_NOISE, 0, positions, 257 * 33))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*normals)


@needs_native
def test_strided_and_empty_positions():
    positions = torch.arange(20)[::3]
    expected = Philox(5, 6, positions).words(Stream.FLIP, (7,))
    assert torch.equal(native.philox_words(5, 6, Stream.FLIP, 0, positions, 7), expected)
    assert native.philox_words(5, 6, Stream.FLIP, 0, positions[:0], 7).shape == (0, 7)


@needs_native
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": 2**64}, "seed must be in"),
        ({"seed": -1}, "seed must be in"),
        ({"step": 2**32}, "step must be in"),
        ({"draw": 2**16}, "draw must be in"),
        ({"elements": -1}, "elements must not be negative"),
        ({"positions": torch.tensor([-1])}, "positions must not be negative"),
        ({"positions": torch.zeros(2)}, "positions must be int64"),
        ({"positions": torch.zeros(2, 2, dtype=torch.int64)}, "positions must be int64"),
    ],
)
def test_values_beyond_the_counter_are_refused(wrong, message):
    right = {"seed": 0, "step": 0, "stream": 0, "draw": 0, "positions": torch.arange(2), "elements": 4}
    for draw in (native.philox_words, native.philox_normals):
        with pytest.raises(ValueError, match=message):
            draw(**{**right, **wrong})
