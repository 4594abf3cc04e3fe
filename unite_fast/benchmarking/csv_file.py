"""A CSV table of measurements, to which several processes may append."""

import csv
import fcntl
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unite_fast.errors import UserError
from unite_fast.utils.files import open_to_append, save_text, writing


def append(path: Path, row: dict) -> None:
    """Append a row. New columns are added to the table; missing values stay empty.

    Raises:
        UserError: the file is not such a table, no permission, no space left.
    """
    row = {name: "" if value is None else value for name, value in row.items()}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        text = path.read_text() if path.exists() else ""
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
    return parse(path, path.read_text())[1]


def parse(path: Path, text: str) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows; both empty for an empty file."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = list(reader.fieldnames or [])
    if columns and "images_per_s" not in columns:
        raise UserError(f"{path} is not a table of unite-fast bench; name another file with --csv")
    return columns, list(reader)


def table(columns: list[str], rows: list[dict], header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
