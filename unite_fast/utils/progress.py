"""Progress of long work: a bar on a terminal, a line every 30 seconds in a pipe."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from unite_fast.distributed.process_group import current_ranks

_SECONDS_BETWEEN_LINES = 30

Track = Callable[[Iterable, int, str], Iterable]
"""(batches, number of batches, title) -> the same batches: `track`, which shows progress, or `no_progress`."""


def progress_bar(console: Console, show: bool = True, transient: bool = False) -> Progress:
    """A bar "title [bar] done/total elapsed left remaining", drawn only on a terminal. `transient` erases it at the
    end."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
        disable=not (show and console.is_terminal),
    )


@contextmanager
def progress(
    title: str, total: int, unit: str, console: Console | None = None, transient: bool = False
) -> Iterator[Callable[[int], None]]:
    """Yield a function; call it with the amount done so far, out of `total`. The default console is stdout."""
    console = console or Console(markup=False, emoji=False, highlight=False)
    start = last_line = time.perf_counter()
    first: int | None = None
    bar = progress_bar(console, transient=transient)
    task = bar.add_task(title, total=total)

    def show(done: int) -> None:
        nonlocal last_line, first
        now = time.perf_counter()
        first = done if first is None else first  # resumed work: what was done before does not count towards the rate
        rate = (done - first) / (now - start)
        speed = f"{rate:.{0 if rate >= 10 else 1}f} {unit}/s"
        bar.update(task, completed=done, description=f"{title} {speed}")
        if not console.is_terminal and now - last_line > _SECONDS_BETWEEN_LINES:
            last_line = now
            left = f"{(total - done) / rate:.0f} s left" if rate else "no rate yet"
            console.print(f"{title} {done}/{total}  {speed}  {left}", soft_wrap=True)

    with bar:
        yield show


def track(batches: Iterable, total: int, title: str) -> Iterator:
    """Yield the same batches; rank 0 shows progress on stderr."""
    if not current_ranks().main:
        yield from batches
        return
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    with progress(title, total, "batches", console, transient=True) as show:
        show(0)
        for done, batch in enumerate(batches, 1):
            yield batch
            show(done)


def no_progress(batches: Iterable, total: int, title: str) -> Iterable:
    """The same batches, without progress."""
    return batches
