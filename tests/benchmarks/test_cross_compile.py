"""What the compiler says about the Triton kernels for one of the GPUs of benchmarks/cross_compile.py."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed; it is for Linux only"
)


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


def test_nothing_spills(rows):
    assert [row for row in rows if row["spill_bytes"]] == []


def test_large_tensors_are_read_and_written_16_bytes_at_a_time(rows):
    # AdamW's kernel of steps reads one number per tensor.
    assert {row["kernel"] for row in rows if row["access_bytes"] != 16} == {"_adamw_steps_kernel"}
