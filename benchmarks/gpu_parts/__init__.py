"""The parts of gpu.py in order of execution, and the entry point that runs one in its own process."""

import importlib
import os
import sys
import time
import traceback
from typing import NamedTuple

SIDE_BY_SIDE, ALONE = "side by side", "alone"
RESULT = "RESULT "
"""Prefix of lines of a part's stdout that are results; other lines go to the log."""


class Part(NamedTuple):
    name: str
    run: str
    """module:function of this package; takes a `context.Context`."""
    limit: float
    """Time limit, seconds."""
    how: str = ALONE
    cuda_only: bool = False
    """Whether it cannot run on a CPU at all."""


PARTS = (
    Part("env", "environment:measure", 60),
    # Not timed, so they share the GPU. The last two fill the compiler caches for the timed parts below.
    Part("ops", "suites:ops", 150, SIDE_BY_SIDE),
    Part("linears_draws", "suites:linears_draws", 120, SIDE_BY_SIDE),
    Part("graphs", "suites:compiled", 150, SIDE_BY_SIDE),
    Part("training", "suites:training", 150, SIDE_BY_SIDE),
    Part("parity", "agreement:parity", 90, SIDE_BY_SIDE),
    Part("digits", "agreement:digits", 150, SIDE_BY_SIDE),
    Part("warm_triton", "steps:warm_triton", 150, SIDE_BY_SIDE, cuda_only=True),
    Part("warm_reference", "steps:warm_reference", 150, SIDE_BY_SIDE, cuda_only=True),
    # Timed.
    Part("bench_triton", "steps:bench_triton", 60),
    Part("bench_compiled", "steps:bench_compiled", 75, cuda_only=True),
    Part("bench_graph", "steps:bench_graph", 60, cuda_only=True),
    Part("profile", "step_profile:measure", 60),
    Part("op_times", "op_times:measure", 60),
    Part("bench_reference", "steps:bench_reference", 75, cuda_only=True),
    Part("bench_triton_8", "steps:bench_triton_8", 45, cuda_only=True),
    Part("bench_graph_8", "steps:bench_graph_8", 45, cuda_only=True),
    Part("bench_compiled_graph_8", "steps:bench_compiled_graph_8", 60, cuda_only=True),
    Part("bench_float8", "steps:bench_float8", 75, cuda_only=True),
    Part("bench_triton_128", "steps:bench_triton_128", 60, cuda_only=True),
    Part("sdpa", "sdpa:measure", 30),
    Part("bench_molecules", "steps:bench_molecules", 75),
    Part("bench_compiled_128", "steps:bench_compiled_128", 100, cuda_only=True),
)

BREAK = "UNITE_FAST_BREAK_GPU_PART"
"""For tests of this command: PART=crash, PART=hang or PART=wrong; several separated by commas."""


def run_part(name: str, device: str, tiny: bool) -> int:
    """Run a part in this process; results go to stdout as lines of JSON.

    Returns:
        0, or 1 if the part raised.
    """
    from gpu_parts.context import Context

    part = next(part for part in PARTS if part.name == name)
    context = Context(name, device, tiny)
    try:
        _break(os.environ.get(BREAK, ""), context)
        module, function = part.run.split(":")
        getattr(importlib.import_module(f"gpu_parts.{module}"), function)(context)
    except Exception as error:
        traceback.print_exc()
        context.say("exception", ok=False, error=f"{type(error).__name__}: {error}"[:500])
        return 1
    finally:
        sys.stdout.flush()
    return 0


def _break(setting: str, context) -> None:
    failure = dict(one.split("=") for one in setting.split(",") if one).get(context.part)
    if failure == "crash":
        os.abort()
    if failure == "hang":
        print("hanging", flush=True)
        time.sleep(3600)
    if failure == "wrong":
        context.say("a wrong number", ok=False, got=1, expected=2)
