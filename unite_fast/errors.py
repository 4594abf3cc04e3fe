"""The exception for a user's mistake, and two checks that raise it."""


class UserError(Exception):
    """Something the user can mend: a wrong key, a missing file, a corrupt checkpoint.

    The message is one line that names what is wrong and how to mend it. The command line prints it without a
    traceback and exits with `status`; library callers catch it like any exception.
    """

    status = 2


def require(condition: bool, message: str) -> None:
    """
    Raises:
        UserError: with this message, if the condition does not hold.
    """
    if not condition:
        raise UserError(message)


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """
    Raises:
        UserError: names the key, the value and the choices, if the value is none of them.
    """
    require(value in choices, f"{key} is {value!r}; it must be one of {', '.join(choices)}")
