"""The benchmark of the loaders runs and prints its rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data.py"


def test_it_prints_a_row_for_each_loader(tmp_path):
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    options = ("--json", "--images", "30", "--batch", "6", "--workers", "1", "--rounds", "1", "--data", tmp_path)
    ended = subprocess.run([sys.executable, SCRIPT, *map(str, options)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    rows = {(row["loader"], row["format"]): row for row in json.loads(ended.stdout)}
    assert {("plain", "folder"), ("folder", "folder"), ("webdataset", "original"), ("raw", "raw")} <= set(rows)
    for row in rows.values():
        assert row["images_per_s"] > 0 and row["cpu_s_per_1000"] >= 0 and row["ratio_to_plain"] > 0
    assert rows["plain", "folder"]["ratio_to_plain"] == 1
