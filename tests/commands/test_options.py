"""Parse options."""

import pytest

from unite_fast.commands.options import parse_classes
from unite_fast.errors import UserError


@pytest.mark.parametrize(("text", "classes"), [("", []), ("3", [3]), ("3,1,4", [3, 1, 4]), ("0, 2", [0, 2])])
def test_classes_are_parsed(text, classes):
    assert parse_classes(text) == classes


@pytest.mark.parametrize("text", ["x", "1,,2", "1;2", "1.5", "1,", ","])
def test_classes_that_are_not_whole_numbers_are_refused(text, mentions):
    with pytest.raises(UserError, match=mentions("--classes", repr(text))):
        parse_classes(text)
