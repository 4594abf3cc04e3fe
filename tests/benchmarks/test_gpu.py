"""benchmarks/gpu.py on a CPU at toy sizes: every part runs, and a part that fails does not affect the others."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unite_fast.kernels import native

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.py"

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "built")


@pytest.fixture
def gpu(tmp_path):
    """Runs the command; returns its exit status, its results by part, and its output."""

    def run(*arguments: str, budget: int = 500, broken: str = "") -> tuple[int, dict[str, list[dict]], str]:
        words = [sys.executable, SCRIPT, "--out", tmp_path, "--device", "cpu", "--tiny", "--budget", str(budget)]
        env = {**os.environ, "UNITE_FAST_BREAK_GPU_PART": broken, "TMPDIR": str(tmp_path)}
        ended = subprocess.run([*words, *arguments], capture_output=True, text=True, env=env, timeout=budget + 10)
        lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
        parts: dict[str, list[dict]] = {}
        for line in lines:
            parts.setdefault(line["part"], []).append(line)
        return ended.returncode, parts, ended.stdout + ended.stderr

    return run


def named(lines: list[dict], name: str) -> dict:
    return next(line for line in lines if line["name"] == name)


@pytest.mark.timeout(600)  # alone on two cores, less than one minute
def test_every_part(gpu, tmp_path):
    status, parts, printed = gpu()
    wrong = [line for lines in parts.values() for line in lines if line["ok"] is False]
    assert (status, wrong) == (0, []), printed[-3000:]
    ran = {name for name, lines in parts.items() if any(line["name"] == "part ended" for line in lines)}
    skipped = {name for name, lines in parts.items() if any(line["name"] == "skipped" for line in lines)}
    timed = "compiled graph reference triton_8 graph_8 compiled_graph_8 float8 triton_128 compiled_128"
    benches = {f"bench_{name}" for name in timed.split()}
    assert skipped == {"warm_triton", "warm_reference", *benches}
    assert ran | skipped == parts.keys() - {"start", "end"} and not ran & skipped
    # Each part has its main result.
    assert named(parts["env"], "copy")["tb_per_s"] > 0
    assert sum(line["ok"] is True for line in parts["ops"]) > 30
    assert [line["graphs"] for line in parts["graphs"] if "graphs" in line] == [1] * 3
    assert named(parts["parity"], "official_tiny_a, native")["quantities"] > 300
    assert named(parts["digits"], "first steps agree")["apart"]["total"] < 1e-4
    for bench in ("bench_triton", "bench_molecules"):
        assert any(line.get("images_per_s", 0) > 0 for line in parts[bench])
    assert {line["name"] for line in parts["profile"]} >= {
        "step",
        "host",
        "part forward 1",
        "part backward 2",
        "part between",
    }
    assert any("share_of_copy" in line.get("forward", {}) for line in parts["op_times"])
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("*.*"))
    assert [str(path) for path in files] == ["log.txt", "results.jsonl", "summary.md"]
    summary = (tmp_path / "summary.md").read_text()
    assert "Nothing was wrong." in summary and "### Steps" in summary and "### Ops" in summary


def test_a_part_that_crashes_or_hangs_does_not_affect_the_others(gpu, tmp_path):
    status, parts, _ = gpu("--only", "env,op_times,sdpa", budget=60, broken="env=crash,sdpa=hang")
    assert status == 1
    assert parts["env"] == [named(parts["env"], "part ended")] and "exit status" in parts["env"][0]["error"]
    assert named(parts["op_times"], "copy")["tb_per_s"] > 0 and named(parts["op_times"], "part ended")["ok"]
    assert named(parts["sdpa"], "part ended")["error"].startswith("stopped after")
    assert "2 results are wrong" in (tmp_path / "summary.md").read_text()


def test_a_wrong_number_and_a_small_budget(gpu):
    status, parts, _ = gpu("--only", "sdpa", broken="sdpa=wrong")
    assert status == 1 and named(parts["sdpa"], "part ended")["ok"] and not named(parts["sdpa"], "a wrong number")["ok"]
    status, parts, _ = gpu("--only", "sdpa", budget=5)
    assert status == 0 and "of the budget are left" in named(parts["sdpa"], "skipped")["why"]


def test_compile_layers_compiles_the_layers_of_a_step(monkeypatch):
    """So the timed parts find their layers in the caches that a warm part fills."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from gpu_parts import steps
    from gpu_parts.context import Context

    from unite_fast.benchmarking.measure import open_trainer, take_step

    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled(self, backend="aot_eager", **how))
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    context = Context("warm", "cpu", tiny=True)
    steps.compile_layers(context, "native")
    assert counters["stats"]["unique_graphs"] > 3
    counters.clear()
    settings = steps.config(context, "native", True, 64)
    settings.perceptual.weight = 0.0
    with open_trainer(settings) as trainer:
        take_step(trainer)
    assert counters["stats"]["unique_graphs"] == 0


def test_mistakes_in_the_arguments(tmp_path, mentions):
    ended = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path, "--only", "ops,fast"], capture_output=True, text=True
    )
    assert ended.returncode == 2 and re.search(mentions("fast"), ended.stderr)
