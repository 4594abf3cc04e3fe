"""The one exception that stands for a user's mistake."""

import os
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


@contextmanager
def writing_aside(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` when all went well: until then, what stood there stays whole.

    Raises:
        UserError: see `writing`.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
