"""A CSV table of measurements, to which several processes may append."""

import csv
import fcntl
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from unite_fast.errors import UserError, printable, reason_of, require
from unite_fast.utils.files import open_to_append, read_small, save_text, writing

MOST_BYTES = 2**26
"""Of a table; a row has about 1 KiB."""
WORDS = ("recipe", "card", "gpus", "date", "commit")
"""Columns that each use of a row needs."""


def append(path: Path, row: dict) -> None:
    """Append a row. New columns are added to the table; missing values stay empty.

    Raises:
        UserError: the file is not such a table, no permission, no space left.
    """
    row = {name: "" if value is None else value for name, value in row.items()}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        text = _read(path) if path.exists() else ""
        columns, rows = parse(path, text)
        missing = [name for name in row if name not in columns]
        if missing:
            save_text(table([*columns, *missing], [*rows, row], header=True), path)
        else:
            with writing(path), open_to_append(path) as file:
                # After a full disk the last line may be cut.
                newline = "" if text.endswith("\n") else "\n"
                file.write((newline + table(columns, [row], header=False)).encode())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock the table against other processes, by a file next to it because the table itself gets replaced."""
    with writing(path), open_to_append(path.with_name(f".{path.name}.lock")) as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table.

    Raises:
        UserError: no such file, or not a table of measurements.
    """
    if not path.is_file():
        raise UserError(f"there is no table {path}; unite-fast bench RECIPE writes one, or name another with --csv")
    return parse(path, _read(path))[1]


def measurements(path: Path, rates: Sequence[str]) -> tuple[list[dict[str, str]], str]:
    """The rows of a table that have all `WORDS` and these rates, without control characters; and a line about the
    others, such as one that a full disk cut. It is empty if there are none.

    Raises:
        UserError: see `read`.
    """
    rows = read(path)
    whole = [all(map(row.get, WORDS)) and all(_is_rate(row.get(name, "")) for name in rates) for row in rows]
    kept = [
        {name: printable(cell) for name, cell in row.items()}
        for row, is_whole in zip(rows, whole, strict=True)
        if is_whole
    ]
    if all(whole):
        return kept, ""
    first = whole.index(False) + 1
    lost = f"{len(rows) - len(kept)} of {len(rows)} rows of {printable(path)}"
    return kept, f"left out: {lost}, first row {first}: a name is empty, or a rate is no positive number"


def _is_rate(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _read(path: Path) -> str:
    try:
        return read_small(path, MOST_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the table {path}: {reason_of(error)}; name another file with --csv") from error


def parse(path: Path, text: str) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows; both empty for an empty file. Missing cells are empty.

    Raises:
        UserError: not a table of measurements.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="")
    try:
        columns, rows = list(reader.fieldnames or []), list(reader)
    except csv.Error as error:
        raise UserError(f"{path} is no table, line {reader.line_num}: {error}; name another file with --csv") from error
    if columns and "images_per_s" not in columns:
        raise UserError(f"{path} is not a table of unite-fast bench; name another file with --csv")
    # To append may mean to write the table again, and these cells would get lost.
    require(len(set(columns)) == len(columns), f"{path} has a column twice; mend it, or name another file with --csv")
    longer = next((number for number, row in enumerate(rows, 1) if None in row), 0)
    require(not longer, f"{path}: row {longer} has more cells than columns; mend it, or name another file with --csv")
    return columns, rows


def table(columns: list[str], rows: list[dict], header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
