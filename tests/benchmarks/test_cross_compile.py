"""What the compiler says about the Triton kernels for one of the GPUs of benchmarks/cross_compile.py."""

import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROW_KERNELS = ("_adaln_fwd_kernel", "_adaln_bwd_kernel")
"""Kernels whose warps share a row, with 2 or 4 neighbours per thread."""
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="the package triton is not installed; it is for Linux only"
    ),
    pytest.mark.timeout(1200),  # compilation takes about a minute alone on two cores
]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    command = [sys.executable, ROOT / "benchmarks/cross_compile.py", "--arch", "90", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_every_kernel_is_compiled_at_every_size(rows):
    sources = (file.read_text() for file in (ROOT / "kernels/triton_kernels").glob("*.py"))
    kernels = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)}
    assert {row["kernel"] for row in rows} == kernels
    for kernel in ("_swiglu_fwd_kernel", "_swiglu_bwd_kernel", "_qk_norm_rope_fwd_kernel", "_qk_norm_rope_bwd_kernel"):
        shapes = {row["shape"] for row in rows if row["kernel"] == kernel}
        assert shapes == {f"{size} 64x{tokens}" for size in ("B", "L", "XL") for tokens in (544, 288)}
    latents = "latents 3x64x256x32"
    for kernel in ("_flow_loss_fwd_kernel", "_flow_loss_bwd_kernel"):
        assert {row["shape"] for row in rows if row["kernel"] == kernel} == {latents, f"lengths {latents}"}


def test_nothing_spills(rows):
    assert [row for row in rows if row["spill_bytes"]] == []


def test_large_tensors_are_read_and_written_16_bytes_at_a_time(rows):
    # AdamW's kernel of steps reads one number per tensor.
    others = [row for row in rows if row["kernel"] not in (*ROW_KERNELS, "_adamw_steps_kernel")]
    assert [row for row in others if row["access_bytes"] != 16] == []


def test_warps_that_share_a_row_read_and_write_whole_lines_of_128_bytes(rows):
    assert [row for row in rows if row["kernel"] in ROW_KERNELS and 32 * row["access_bytes"] < 128] == []


def test_the_next_row_is_in_flight_while_a_row_is_reduced(rows):
    """By Little's law an H100 needs 15 KB in flight on each multiprocessor."""
    checked = [row for row in rows if row["kernel"] in ROW_KERNELS]
    assert [row for row in checked if not row["ahead"] or row["in_flight_kb"] < 15] == []
    # For each sum over a row; the last one also serves the next row's copies.
    each = 2 if importlib.metadata.version("triton") >= "3.8" else 3
    assert {row["barriers"] for row in checked if "norm_adaln" in row["op"]} == {2 * each}
    assert {row["barriers"] for row in checked if "norm_adaln" not in row["op"]} == {each}


def test_programs_of_the_adaln_kernels_fill_their_last_wave(rows):
    waves = [row["waves"] for row in rows if row["kernel"] in ROW_KERNELS]
    assert min(wave / math.ceil(wave) for wave in waves) > 0.6
