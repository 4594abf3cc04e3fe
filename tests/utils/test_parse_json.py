"""Strict JSON, and its check against a schema."""

import json
from dataclasses import dataclass

import pytest

from unite_fast.utils.parse_json import check_kind, parse_as, parse_json


@dataclass
class Pair:
    name: str
    size: int


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "[Infinity]",
        "-Infinity",
        "1e999",
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        '{"a": 1, "a": 2}',
        "9" * 10_000,
        b"\xff",
        "",
        "{",
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_is_not_strict_json_is_one_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_strict_json_is_parsed():
    assert parse_json(b'{"a": [1, 2.5, null, true, "\xc3\xa9"]}') == {"a": [1, 2.5, None, True, "é"]}


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"name": 1, "size": 1}', "name"),
        ('{"name": "a", "size": "1"}', "size"),
        ('{"name": "a", "size": true}', "size"),
        ('{"name": "a", "size": 1.0}', "size"),
        ('{"name": "a"}', "size"),
    ],
)
def test_a_wrong_type_is_named_by_its_field(text, field):
    with pytest.raises(ValueError, match=f"^{field}: ") as caught:
        parse_as(Pair, text)
    assert "\n" not in str(caught.value)


def test_names_that_are_no_text_are_checked(tmp_path):
    """A file name with such bytes is a string with lone surrogates, which JSON can hold and pydantic refuses."""
    assert parse_as(Pair, json.dumps({"name": "a\udcff", "size": 3})) == Pair("a?", 3)
    with pytest.raises(ValueError, match=r"^a\?\\x1b\\n: ") as caught:
        check_kind(dict[str, int], {"a\udcff\x1b\n": "x"})
    assert "\n" not in str(caught.value)


def test_a_dataclass_is_made():
    assert parse_as(Pair, '{"name": "a", "size": 3}') == Pair("a", 3)
