"""Write files safely, and read metrics.jsonl."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unite_fast.errors import UserError, require


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError (disk full, no permission) into a `UserError` that names `path`; often the OSError names no
    file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` on success. Until then the old file stays intact.

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


def check_target(out: Path, suffixes: tuple[str, ...] = (".png", ".npz", "")) -> None:
    """Check an output path before the work starts; the suffix "" stands for a folder.

    Raises:
        UserError: another suffix; a file in place of a folder, or a folder in place of a file.
    """
    allowed = ", ".join(suffix or "a folder (no suffix)" for suffix in suffixes)
    require(out.suffix in suffixes, f"{out} ends in {out.suffix or 'nothing'}; the output can be: {allowed}")
    require(not out.exists() or out.is_dir() == (not out.suffix), f"{out} is in the way; choose another --out")


def save_text(text: str, out: Path) -> None:
    """Write a text file in UTF-8, atomically; its folder is created if missing.

    Raises:
        UserError: see `writing`.
    """
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as partial:
        partial.write_text(text, encoding="utf-8")


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; incomplete lines (after a kill or on a full disk) are skipped."""
    rows = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "step" in row:
                rows.append(row)
    return rows
