"""Context of a part of gpu.py: device, output of results, timing."""

import json
import os
import statistics
import sys
from collections.abc import Callable
from itertools import pairwise

import torch

from gpu_parts import RESULT
from unite_fast.benchmarking.matmul_rate import timed


class Context:
    """Device, output and timing of a part.

    Attributes:
        part: name of the part.
        device: cuda or cpu.
        tiny: whether to use toy sizes.
        backend_name: the fast backend of the kernels on this device.
    """

    def __init__(self, part: str, device: str, tiny: bool):
        self.part, self.device, self.tiny = part, torch.device(device), tiny
        self.cuda = device == "cuda"
        self.backend_name = "triton" if self.cuda else "native"
        # A duplicate descriptor: pytest captures the original one while tests run.
        self.out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        if self.cuda and not torch.cuda.is_available():
            raise SystemExit("torch finds no CUDA device; use --device cpu --tiny to try the command without one")

    def say(self, name: str, ok: bool | None = None, **facts) -> None:
        """Write a result. `ok`: whether it is correct; None for measurements."""
        line = RESULT + json.dumps({"part": self.part, "name": name, "ok": ok, **facts}, default=str)
        # Start a new line: pytest's dots do not end with one.
        self.out.write(f"\n{line}\n")
        self.out.flush()

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        """Median seconds of a call, including its work on the device, after one warm-up call."""
        run()
        return statistics.median(timed(run, self.device) for _ in range(repeats))

    def device_seconds(self, run: Callable[[], object], repeats: int) -> float:
        """Median seconds of a call by the device's clock. On a GPU the calls queue behind a wait of about 20 ms, so
        that launch overhead is not measured."""
        if not self.cuda:
            return self.seconds(run, repeats)
        run()
        torch.cuda.synchronize()
        torch.cuda._sleep(40_000_000)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks)) / 1e3
