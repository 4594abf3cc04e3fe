"""stdout and stderr that are closed, full, or a pipe without a reader."""

import os
import subprocess
import sys

import pytest

CODE = """
import contextlib, os, sys
from unite_fast.utils.standard_streams import guard_streams, report_lost_output
guard_streams()
guard_streams()
with open("file", "w") as file:  # it must not get the descriptor of stdout
    with contextlib.suppress(OSError):
        os.write(1, b"printed by a library")
    print("x" * 100_000)
    print("\\udcff", file=sys.stderr)
    file.write("content")
report_lost_output()
"""


@pytest.mark.parametrize(
    ("redirected", "error"),
    [
        ("", "\\udcff\n"),
        (">&-", "\\udcff\n"),
        (">/dev/full", "\\udcff\nwarning: some output is lost: No space left on device\n"),
        (">&- 2>&-", ""),
        ("<&- >&-", "\\udcff\n"),
        (">/dev/full 2>/dev/full", ""),
        ("<&- >&- 2>&-", ""),
        ("| head -c 1", "\\udcff\n"),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "-u"])
def test_no_stream_ends_a_command(tmp_path, redirected, error, unbuffered):
    # `pipefail`: the status of the pipe is that of the command.
    script = f'set -o pipefail; "$0" {unbuffered} -c "$1" {redirected}'
    ended = subprocess.run(["bash", "-c", script, sys.executable, CODE], capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, error)
    assert (tmp_path / "file").read_text() == "content"
    assert os.listdir(tmp_path) == ["file"]
