"""The one exception that stands for a user's mistake."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something the user can mend: a wrong key, a missing file, a corrupt checkpoint.

    The message is one line that names what is wrong and how to mend it. The command line prints it without a
    traceback and exits with `status`; a library caller catches it like any exception.
    """

    status = 2


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses inside (no space left, no permission) becomes a `UserError` that names `path`; the
    system's own message often names no file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
