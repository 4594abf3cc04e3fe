"""Time of each op and its share of the copy bandwidth, with timing and byte counts of benchmarks/kernels.py."""

import statistics
import traceback

import torch

import kernels as bench  # benchmarks/kernels.py
from gpu_parts.context import Context

SHAPES = [(64, 544, 768), (192, 288, 768)]
"""A tokenizer pass and three flow draws of 64 images, in UNITE-B."""
TINY = [(2, 24, 128)]
SECONDS = 0.8
"""Measuring time per case, both backends together."""
PREDICTED = {
    "adaln_modulate": (0.85, 0.59),
    "gated_residual_adaln": (0.81, 0.59),
    "gated_residual_norm_adaln": (0.75, 0.50),
    "qk_norm_rope": (0.75, 0.68),
    "swiglu": (0.89, 0.89),
}
"""Shares of the copy bandwidth, forward and backward: predicted for an H100 on 2026-11-26 at d6aaa46 from the compiled
code, before any run on a GPU."""


def measure(c: Context) -> None:
    torch.manual_seed(1)
    if c.tiny:
        bench.ROTATED, bench.COPIED = 2**16, 2**20
    bandwidth = bench.copy_bandwidth(c.device, 0.1 if c.tiny else 1.0)
    c.say("copy", tb_per_s=float(f"{bandwidth / 1e12:.4g}"))
    shapes = TINY if c.tiny else SHAPES
    for shape in shapes:
        ops = [name for name, op in bench.OPS.items() if op.part == "block" or shape == shapes[0]]
        for case in bench.cases(ops, [shape], c.device):
            try:
                one_case(c, case, bandwidth)
            except Exception as error:
                traceback.print_exc()
                c.say(case.title, ok=False, error=f"{type(error).__name__}: {error}"[:300])
            if c.cuda:
                torch.cuda.empty_cache()


def one_case(c: Context, case, bandwidth: float) -> None:
    times = bench.measure(case, 0.02 if c.tiny else SECONDS, compiled=False, warm_up=0.02 if c.tiny else 0.1)
    facts = {}
    for place, way in enumerate(("forward", "backward")):
        ours, eager = (statistics.median(times[backend_name][way]) for backend_name in (c.backend_name, "eager"))
        facts[way] = {
            "us": round(1e3 * ours, 1),
            "mb": round(case.bytes[place] / 1e6, 1),
            "share_of_copy": round(case.bytes[place] / (ours * 1e-3) / bandwidth, 3),
            "times_eager": round(eager / ours, 2),
        }
        if c.cuda and case.op.name in PREDICTED:
            facts[way]["predicted_share"] = PREDICTED[case.op.name][place]
    c.say(case.title, **facts)
