"""The exceptions for user errors, two checks that raise them, and what their messages quote."""


class UserError(Exception):
    """An error that the user can fix: a wrong key, a missing file, a corrupt checkpoint.

    The message is one line: what is wrong and how to fix it. The command line prints it without a traceback and exits
    with `status`.
    """

    status = 2

    def __init__(self, message: str):
        super().__init__(printable(message))  # it may quote names from files


class CommonError(UserError):
    """A mistake that all ranks find together. The message names those that it concerns, so each machine prints it
    once."""

    raised_by = None


class TemporaryError(UserError):
    """Not a mistake of the user: the same command may succeed later, so torchrun may restart it."""

    status = 75  # EX_TEMPFAIL of sysexits.h


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


def printable(text: object) -> str:
    """A text on one line. Control characters and bytes that are not text are escaped; file names may hold both."""
    words = one_line(str(text))
    return words if words.isprintable() else "".join(map(_escaped, words))


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte of a file name, as os.fsdecode gives it
        return f"\\x{ord(letter) & 0xFF:02x}"
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode()


def reason_of(error: BaseException) -> str:
    """Why an error was raised, in one line. Of the system's errors without the path, which the message names."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def one_line(text: str) -> str:
    """A text without line breaks and repeated spaces."""
    return " ".join(text.split())
