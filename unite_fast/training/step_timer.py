"""Time spent in each part of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

HOST = ("data",)
"""Parts measured by the host's clock on every device: the process waits."""
DEVICE = ("forward", "backward", "optimizer")
"""Parts measured by CUDA events on a GPU, which runs them later than they are launched."""


class StepClock:
    """Seconds spent in each part of a step, summed until `take`. An ordinary step does not wait for the GPU.

        with clock.measure("forward"):
            ...

    Parts do not nest. On a GPU, waiting for data overlaps with queued work, so the parts may add up to more than the
    elapsed time; "other" is then 0.
    """

    def __init__(self, device: torch.device):
        self.use_events = device.type == "cuda"
        self.recorded: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.free_events: list[torch.cuda.Event] = []
        self.is_paused = False
        self.start()

    def start(self) -> None:
        """Reset all sums; time counts from now."""
        self.started_at = time.perf_counter()
        self.seconds: dict[str, float] = dict.fromkeys((*HOST, *DEVICE), 0.0)
        self.free_events += [event for _, *pair in self.recorded for event in pair]
        self.recorded = []

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time inside to a part: one of HOST or DEVICE."""
        if self.is_paused:
            yield
        elif self.use_events and part in DEVICE:
            start, end = self._event(), self._event()
            start.record()
            yield
            end.record()
            self.recorded.append((part, start, end))
        else:
            started_at = time.perf_counter()
            yield
            self.seconds[part] += time.perf_counter() - started_at

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing: while a CUDA graph is captured, nothing runs, and an event would become part of it."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def _event(self) -> torch.cuda.Event:
        return self.free_events.pop() if self.free_events else torch.cuda.Event(enable_timing=True)

    def take(self) -> tuple[float, dict[str, float]]:
        """(seconds since the start, seconds of each part and of "other"), then reset. Waits for the device."""
        for part, start, end in self.recorded:
            end.synchronize()
            self.seconds[part] += start.elapsed_time(end) / 1e3
        elapsed, parts = time.perf_counter() - self.started_at, self.seconds
        self.start()
        return elapsed, {**parts, "other": max(0.0, elapsed - sum(parts.values()))}
