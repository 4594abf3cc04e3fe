"""Progress of long work, for a person who waits."""

from collections.abc import Iterable

from rich.console import Console
from rich.progress import track

from unite_fast.ranks import current_ranks


def shown(batches: Iterable, total: int, title: str) -> Iterable:
    """The same batches; rank 0 draws a bar on a terminal."""
    console = Console(stderr=True)
    quiet = not (console.is_terminal and current_ranks().main)
    return track(batches, title, total, console=console, transient=True, disable=quiet)
