"""Messages of errors."""

import os
import pickle

import pytest

from unite_fast.errors import UserError, printable, reason_of, require, require_choice, shown


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "\u202egnp", "\ud800", "\0", "tab\tx", "\x7f", "\x85"])
def test_a_message_is_one_printable_line(name):
    message = str(UserError(f"there is no {name}"))
    assert message.isprintable()
    assert "there is no" in message
    message.encode()


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


def test_other_scripts_stay_as_they_are():
    assert str(UserError("есть größe 猫")) == "есть größe 猫"


def test_an_error_travels_between_processes():
    assert str(pickle.loads(pickle.dumps(UserError("a\nb")))) == "a b"


def test_the_reason_of_an_error_is_one_line_without_the_file_name():
    assert reason_of(FileNotFoundError(2, os.strerror(2), "a.jpg")) == os.strerror(2)
    assert reason_of(ValueError("first\nsecond")) == "first" and reason_of(MemoryError()) == "MemoryError"


def test_a_long_value_is_cut():
    assert len(shown("x" * 1000)) == 80
    assert shown([1, "a\n"]) == r"[1, 'a\n']"


def test_checks_raise_user_errors(mentions):
    require(True, "")
    require_choice("key", "a", ("a", "b"))
    with pytest.raises(UserError, match="wrong"):
        require(False, "wrong")
    with pytest.raises(UserError, match=mentions("key", "a, b")):
        require_choice("key", "c", ("a", "b"))
