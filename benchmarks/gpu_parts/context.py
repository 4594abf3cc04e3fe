"""What a part of gpu.py has at hand: the device, a way to write results, a clock."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import torch

from gpu_parts import RESULT


class Context:
    """
    Attributes:
        part: name of the part.
        device: cuda or cpu.
        tiny: toy sizes.
        backend: the fast backends of this device.
    """

    def __init__(self, part: str, device: str, tiny: bool):
        self.part, self.device, self.tiny = part, torch.device(device), tiny
        self.cuda = device == "cuda"
        self.backend_name = "triton" if self.cuda else "native"
        # A descriptor of its own: pytest takes the process's while tests run.
        self.out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        if self.cuda and not torch.cuda.is_available():
            raise SystemExit("torch sees no CUDA device here; --device cpu --tiny tries the command without one")

    def say(self, name: str, ok: bool | None = None, **facts) -> None:
        """Write a result: `ok` is True or False of what can be wrong, None of what is only measured."""
        line = RESULT + json.dumps({"part": self.part, "name": name, "ok": ok, **facts}, default=str)
        # A line of its own, whatever stands before it: pytest's dots have no end of line.
        self.out.write(f"\n{line}\n")
        self.out.flush()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        """Median seconds of a call, the device waited for; one call before warms up."""
        run()
        found = []
        for _ in range(repeats):
            self.wait()
            begun = time.perf_counter()
            run()
            self.wait()
            found.append(time.perf_counter() - begun)
        return statistics.median(found)

    def device_seconds(self, run: Callable[[], object], repeats: int) -> float:
        """Median seconds of a call on the device's own clock: short calls are not timed by the host, which on a GPU
        queues them behind a wait of about 20 ms."""
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
