"""A progress bar for what takes long: rate and time left, on a terminal as a bar, elsewhere as a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 30


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how much is done so far, of `total`."""
    console = Console(markup=False, emoji=False, highlight=False)
    begun = spoken = time.perf_counter()
    first: int | None = None
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(
        *columns, TextColumn("left"), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
    task = bar.add_task(title, total=total)

    def show(done: int) -> None:
        nonlocal spoken, first
        now = time.perf_counter()
        first = done if first is None else first  # an earlier run's work says nothing of this one's speed
        rate = (done - first) / (now - begun)
        bar.update(task, completed=done, description=f"{title} {rate:.0f} {unit}/s")
        if not console.is_terminal and now - spoken > _SECONDS_BETWEEN_LINES:
            spoken = now
            left = f"{(total - done) / rate:.0f} s left" if rate else "no rate yet"
            console.print(f"{title} {done}/{total}  {rate:.0f} {unit}/s  {left}", soft_wrap=True)

    with bar:
        yield show
