"""Rows of metrics.jsonl and curve.jsonl, one JSON object per line. A log of any length costs little to open."""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from unite_fast.utils.files import atomic_write, open_regular, open_to_append

WHOLE, BLOCK, LONGEST_LINE = 2**22, 2**16, 2**16
"""Bytes: the largest metrics.jsonl that is read as a whole (some 10,000 rows), one read, and one row at most."""
MOST_ROWS = 2000
"""Rows of a larger file, evenly spaced; a curve in a picture shows no more."""


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl or curve.jsonl; incomplete and foreign lines (after a kill or on a full disk) are
    skipped. Of a file above `WHOLE` bytes only the last rows are all there, and of those before some, evenly spaced.

    Raises:
        OSError: no permission, or not a regular file.
    """
    if not path.exists():
        return []
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE:
            lines = file.read(WHOLE).split(b"\n")
        else:
            lines = []
            for number in range(MOST_ROWS):
                file.seek((size - BLOCK) * number // MOST_ROWS)
                if number:
                    file.readline(LONGEST_LINE)  # the rest of a line
                lines.append(file.readline(LONGEST_LINE))
            file.seek(size - BLOCK)
            lines += file.read(BLOCK).split(b"\n")[1:]
    rows = [row for line in lines if (row := parse_row(line))]
    return rows if size <= WHOLE else list({row["step"]: row for row in rows}.values())


def parse_row(line: bytes) -> dict | None:
    """A line of metrics.jsonl; None if it is not a JSON object with a step and values of a usual size."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        return None
    return None if any(isinstance(value, int) and abs(value) >= 2**63 for value in row.values()) else row


def own_file(path: Path) -> None:
    """Make a log that shares its file with others one of its own. A link goes, since its target is not ours. If the
    file has a second name, as after `cp -al`, its content is copied.

    Raises:
        OSError: no permission, or no space.
    """
    if path.is_symlink():
        path.unlink()
    elif path.is_file() and path.stat().st_nlink > 1:
        with atomic_write(path) as partial:
            shutil.copyfile(path, partial)


def set_aside(path: Path) -> Path | None:
    """Rename a log with content, so that a new one begins; returns its new name, or None if there was nothing.

    Raises:
        OSError: no permission.
    """
    if not path.is_file() or not path.stat().st_size:
        return None
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    old = next(name for name in names if not os.path.lexists(name))
    return path.rename(old)


def drop_rows_after(path: Path, step: int) -> None:
    """Cut off the rows after `step` and an incomplete last line, in place. Reads only the end of the file; makes the
    file if it is missing.

    Raises:
        OSError: see `open_to_append`.
    """
    with open_to_append(path) as file:
        for end, line in _lines_backwards(file.fileno()):
            row = parse_row(line)
            if row and row["step"] <= step:
                if not line.endswith(b"\n"):
                    file.write(b"\n")
                else:
                    file.truncate(end)
                return
        file.truncate(0)


def _lines_backwards(descriptor: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a file from the last to the first, each with the offset of its end."""
    start = os.fstat(descriptor).st_size
    rest = b""
    while start > 0:
        before, start = start, max(0, start - BLOCK)
        text = os.pread(descriptor, before - start, start) + rest
        end = start + len(text)
        # The first line may begin in the block before.
        first = (text.find(b"\n") + 1 or len(text)) if start else 0
        for line in reversed(text[first:].splitlines(keepends=True)):
            yield end, line
            end -= len(line)
        rest = text[:first] if first <= LONGEST_LINE else b""  # no row is that long


def thin_rows(rows: list[dict]) -> list[dict]:
    """Rows for curves: of twice `MOST_ROWS`, every second one of the older half is dropped."""
    if len(rows) < 2 * MOST_ROWS:
        return rows
    return [*rows[:MOST_ROWS:2], *rows[MOST_ROWS:]]
