"""benchmarks/host_time.py in a process of its own: there, Triton's kernels are made for the compiler."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed; it is for Linux only"
)


def run(*options: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "benchmarks/host_time.py", "--steps", "3", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_micro_batch_with_lpips():
    ended = run("--recipe", "digits", "--set", "perceptual.weight=1", "--set", "train.precision=bfloat16", "--json")
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    times = result["ms"]
    assert [len(each) for each in times.values()] == [3, 3, 3, 3]
    parts = zip(times["forward"], times["backward"], times["passes"], strict=True)
    assert all(0 < forward + backward < whole for forward, backward, whole in parts)
    assert result["add_us"] > 0
    assert 5_000 < result["calls"]["passes"] < 67_000  # those of UNITE-B
    assert result["calls"]["optimizer"] > 100


def test_ranks_take_more_of_the_host():
    """FSDP's hooks, in a process group of two whose collectives do nothing."""
    calls = []
    for words in ((), ("--ranks", "2", "--set", "parallel.strategy=ddp")):
        ended = run("--recipe", "digits", "--set", "train.precision=bfloat16", "--json", *words)
        assert ended.returncode == 0, ended.stderr
        calls.append(json.loads(ended.stdout)["calls"]["passes"])
    alone, ranks = calls
    assert 1.3 * alone < ranks < 4 * alone


def test_a_cuda_graph_leaves_little_to_the_host():
    settings = "train.precision=bfloat16", "train.cuda_graph=true"
    ended = run("--recipe", "digits", *(word for key in settings for word in ("--set", key)), "--json")
    assert ended.returncode == 0, ended.stderr
    assert 50 < json.loads(ended.stdout)["calls"]["passes"] < 2_000


def test_an_unknown_recipe_is_a_mistake():
    ended = run("--recipe", "nothing")
    assert ended.returncode == 2 and "nothing" in ended.stderr
