import numpy as np
import pytest

from unite_fast.data_pipeline.molecules.frames import (
    MOST_EXAMPLES,
    BrokenMolecule,
    LeftOut,
    Lines,
    make_frame,
    parse_element,
)
from unite_fast.errors import UserError

APART = np.array([[0, 0, 0], [0, 0, 0.11]])


def test_a_good_molecule_is_kept():
    frame = make_frame([1, 118], APART)
    assert frame.numbers.dtype == np.uint8 and frame.numbers.tolist() == [1, 118]
    assert np.array_equal(frame.positions, APART)


@pytest.mark.parametrize(
    ("numbers", "positions", "tokens"),
    [
        ([], np.zeros((0, 3)), "no atoms"),
        ([1] * 257, np.arange(257 * 3.0).reshape(257, 3), "257 .*256"),
        ([0, 1], APART, "0"),
        ([1, 119], APART, "119"),
        ([1, 1], APART * np.nan, "finite"),
        ([1, 1], APART + np.array([0, np.inf, 0]), "finite"),
        ([1, 1], APART + np.array([0, 1e300, 0]), "finite"),
        ([1, 1], APART * 0.9, "duplicate atoms: 1 and 2"),
    ],
)
def test_a_broken_molecule_has_a_reason(numbers, positions, tokens):
    with pytest.raises(BrokenMolecule, match=tokens):
        make_frame(numbers, positions)


def test_as_many_atoms_as_may_be():
    assert len(make_frame([6] * 256, np.arange(256 * 3.0).reshape(256, 3)).numbers) == 256


@pytest.mark.parametrize(("word", "number"), [("H", 1), ("Cl", 17), ("CL", 17), ("cl", 17), ("17", 17), ("118", 118)])
def test_elements_are_symbols_or_numbers(word, number):
    assert parse_element(word) == number


@pytest.mark.parametrize("word", ["", "X", "C1", "0", "119", "-1", "6.0", "٦", "9" * 5000])
def test_what_is_no_element(word):
    with pytest.raises(BrokenMolecule):
        parse_element(word)


def test_only_the_first_are_named(tmp_path):
    left_out = LeftOut()
    for number in range(1, 101):
        left_out.add(tmp_path / "a\n.xyz", number, "no\natoms")
    assert left_out.broken == 100 and len(left_out.examples) == MOST_EXAMPLES
    assert all(example.isprintable() for example in left_out.examples)
    assert left_out.examples[1].endswith("molecule 2: no atoms")


def test_lines_and_the_next(tmp_path):
    (tmp_path / "a").write_bytes(b"1\r\n\xff\n" + b"x" * 100_000)
    with Lines(tmp_path / "a") as lines:
        assert (lines.next, lines.take(), lines.next, lines.take()) == ("1", "1", "\ufffd", "\ufffd")
        assert [len(lines.take()), len(lines.take()), lines.take(), lines.take()] == [65536, 34464, None, None]


def test_what_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "empty").touch()
    for name in ("empty", "missing", "."):
        with pytest.raises(UserError, match=str(tmp_path)):
            Lines(tmp_path / name)
