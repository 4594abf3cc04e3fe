"""Compare the GPU's numbers with the released code (a trace) and with a CPU (a run of the digits recipe)."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from gpu_parts.context import Context
from unite_fast.interop import parity as traces
from unite_fast.interop.trace import Trace
from unite_fast.kernels import backend

TRACE = Path(__file__).parents[2] / "tests/data/official_tiny_a.npz"
FIRST_ROW = 1e-4
"""Maximum relative difference of the mean losses of the first five steps on two devices in float32. Between the C++ and
the reference backend on one CPU it was 1e-6; a GPU's matmuls also sum in another order."""
LAST_ROW = 0.05
"""The same for the last five of 200 steps: rounding grows from step to step, but both runs learn equally."""


def parity(c: Context) -> None:
    """All quantities of the trace: forward, samples, gradients, steps, final weights."""
    for backend_name in (c.backend_name,) if c.tiny else (c.backend_name, "reference"):
        start_time = time.perf_counter()
        with backend.using(backend_name):
            rows = traces.compare(Trace(TRACE, c.device))
        failed = [[row.name, row.error, row.tolerance] for row in rows if not row.passed]
        worst = {
            group.kind: f"{group.worst.error:.1e} of {group.worst.tolerance:.1e} allowed"
            for group in traces.summarise(rows)
        }
        seconds = round(time.perf_counter() - start_time, 1)
        c.say(
            f"{TRACE.stem}, {backend_name}",
            ok=not failed,
            quantities=len(rows),
            failed=failed[:6],
            worst=worst,
            seconds=seconds,
        )


def digits(c: Context) -> None:
    """The same run of the digits recipe in float32 on the GPU and on the CPU, in parallel."""
    steps = 10 if c.tiny else 200
    folder = Path.cwd() / f"digits_{os.getpid()}"
    runs = {
        name: start(folder / name, steps, f"train.device={device}", f"kernels={backend_name}")
        for name, device, backend_name in (
            ("ours", c.device.type, c.backend_name),
            ("cpu", "cpu", "auto" if c.cuda else "reference"),
        )
    }
    rows = {}
    for name, process in runs.items():
        output, _ = process.communicate()
        print(output[-3000:])
        if process.returncode:
            c.say(f"run on {c.device.type if name == 'ours' else 'cpu'}", ok=False, error=output[-500:])
            continue
        rows[name] = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder, ignore_errors=True)
    if len(rows) < 2:
        return
    apart = {
        row["step"]: {key: float(f"{abs(row[key] - cpu[key]) / abs(cpu[key]):.1e}") for key in ("total", "l1", "flow")}
        for row, cpu in zip(rows["ours"], rows["cpu"], strict=True)
    }
    first, last = (apart[rows["ours"][i]["step"]] for i in (0, -1))
    learns = rows["ours"][-1]["total"] < rows["ours"][0]["total"]
    speeds = {f"images_per_s_{name}": round(run_rows[-1]["images_per_s"], 1) for name, run_rows in rows.items()}
    c.say("first steps agree", ok=max(first.values()) <= FIRST_ROW, apart=first, allowed=FIRST_ROW)
    c.say("last steps agree", ok=max(last.values()) <= LAST_ROW and learns, apart=last, allowed=LAST_ROW, **speeds)
    c.say("all steps", apart={step: values["total"] for step, values in apart.items()})


def start(out: Path, steps: int, *settings: str) -> subprocess.Popen:
    every = f"train.steps={steps}", "train.log_every=5", f"train.checkpoint_every={steps}", "train.picture_every=0"
    words = [*every, "sampling.solver=euler", "sampling.steps=2", f"train.out={out}", *settings]
    command = [sys.executable, "-m", "unite_fast", "train", "digits", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
