"""The exception for user errors, and two checks that raise it."""


class UserError(Exception):
    """An error that the user can fix: a wrong key, a missing file, a corrupt checkpoint.

    The message is one line: what is wrong and how to fix it. The command line prints it without a traceback and exits
    with `status`.
    """

    status = 2


def require(condition: bool, message: str) -> None:
    """Raise a UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a UserError with key, value and choices unless the value is one of the choices."""
    require(value in choices, f"{key} is {value!r}; it must be one of {', '.join(choices)}")
