"""The exception for user errors, two checks that raise it, and values in its messages."""


class UserError(Exception):
    """An error that the user can fix: a wrong key, a missing file, a corrupt checkpoint.

    The message is one line: what is wrong and how to fix it. The command line prints it without a traceback and exits
    with `status`.
    """

    status = 2

    def __init__(self, message: str):
        super().__init__(printable(message))  # it may quote names from files


def require(condition: bool, message: str) -> None:
    """Raise a UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a UserError with key, value and choices unless the value is one of the choices."""
    require(value in choices, f"{key} is {value!r}; it must be one of {', '.join(choices)}")


def shown(value: object) -> str:
    """A value for a message: printable, at most 80 letters."""
    text = printable(repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def printable(text: str) -> str:
    """A text on one line, with control characters and the like escaped; file names may hold them."""
    words = one_line(text)
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in words)


def one_line(text: str) -> str:
    """A text without line breaks and repeated spaces."""
    return " ".join(text.split())
