"""What a run writes besides its checkpoints: it can do without, so a failure is a warning."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from unite_fast.errors import printable


class SideOutputs:
    """Metrics, TensorBoard events, pictures and the like. If one fails, the run warns once and goes on."""

    def __init__(self, warn: Callable[[str], None] = print):
        self.warn = warn
        self.failed: set[str] = set()

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Inside, any exception becomes a warning, the first time for each `name`."""
        try:
            yield
        except Exception as error:  # libraries raise many kinds
            if name not in self.failed:
                self.failed.add(name)
                self.warn(f"warning: {name}: {_reason(error)}; the run goes on without it")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else error.filename
        return printable(f"{name}: {error.strerror}" if name else error.strerror)
    return printable(error) or type(error).__name__
