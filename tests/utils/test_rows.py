"""Rows of metrics: read, cut off, thinned out."""

import io
import os

import pytest

from unite_fast.utils import rows
from unite_fast.utils.files import open_regular
from unite_fast.utils.rows import (
    LONGEST_LINE,
    MOST_ROWS,
    drop_rows_after,
    own_file,
    read_rows,
    set_aside,
    thin_rows,
)


def test_incomplete_rows_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    path.write_text('{"step": 1, "l1": 2.0}\n[1]\n{"l1": 3}\n{"step": 2, "l1": NaN}\n{"step": 3, "l')
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_rows_after_a_step_are_cut_off_and_a_torn_row_is_ended(tmp_path):
    path = tmp_path / "rows"
    lines = [b'{"step": %d, "x": "%s"}\n' % (step, b"y" * 50_000) for step in range(10)]
    path.write_bytes(b"".join(lines) + b'{"step": 10, "x')
    drop_rows_after(path, 6)
    assert path.read_bytes() == b"".join(lines[:7])
    path.write_bytes(b"".join(lines).rstrip(b"\n"))
    drop_rows_after(path, 9)
    assert path.read_bytes() == b"".join(lines)
    # Lines that are no rows, however long.
    path.write_bytes(lines[0] + b"z" * 3 * LONGEST_LINE + b"\n" + lines[5])
    drop_rows_after(path, 1)
    assert path.read_bytes() == lines[0]
    drop_rows_after(path, -1)
    drop_rows_after(tmp_path / "new", 5)
    assert path.read_bytes() == (tmp_path / "new").read_bytes() == b""


@pytest.mark.parametrize(
    "line",
    [
        *("5", "[]", "{}", '{"step": "5"}', '{"step": true}', '{"step": -1}', '{"step": 1.5}', "[" * 100_000),
        *('{"step": 1%s}' % ("0" * 30), '{"step": 1, "l1": 1%s}' % ("0" * 400), '{"step": 1%s}' % ("0" * 5000)),
    ],
)
def test_a_line_that_is_no_row_is_skipped(tmp_path, line):
    (tmp_path / "rows").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    assert [row["step"] for row in read_rows(tmp_path / "rows")] == [1, 2]


def test_the_older_half_of_many_rows_is_thinned_out():
    rows = [{"step": step} for step in range(2 * MOST_ROWS)]
    assert thin_rows(rows[1:]) == rows[1:]
    assert [row["step"] for row in thin_rows(rows)] == [*range(0, MOST_ROWS, 2), *range(MOST_ROWS, 2 * MOST_ROWS)]


def test_a_log_with_a_second_name_is_copied_and_a_link_goes(tmp_path):
    """A copy by `cp -al` shares its files with the original."""
    original, copy, link = tmp_path / "original", tmp_path / "copy", tmp_path / "link"
    original.write_text('{"step": 1}\n{"step": 2}\n')
    os.link(original, copy)
    link.symlink_to(original)
    for path in (original, copy, link, tmp_path / "none"):
        own_file(path)
    drop_rows_after(copy, 1)
    assert [len(read_rows(path)) for path in (original, copy, link)] == [2, 1, 0]


def test_a_log_of_an_earlier_run_is_kept(tmp_path):
    log = tmp_path / "metrics.jsonl"
    assert set_aside(log) is None
    log.touch()
    assert set_aside(log) is None
    for number in (1, 2):
        log.write_text(f"{number}")
        old = set_aside(log)
        assert (old.name, old.read_text(), log.exists()) == (f"metrics.{number}.jsonl", f"{number}", False)


def test_of_a_log_of_one_endless_line_little_is_read(tmp_path, monkeypatch):
    lengths = []

    class Counted(io.BufferedReader):
        def readline(self, size=-1):
            line = super().readline(size)
            lengths.append(len(line))
            return line

    monkeypatch.setattr(rows, "open_regular", lambda path: Counted(open_regular(path, buffering=0)))
    with (tmp_path / "rows").open("wb") as file:
        file.truncate(2**31)
    assert read_rows(tmp_path / "rows") == []
    assert 0 < sum(lengths) <= 2 * MOST_ROWS * LONGEST_LINE
