"""Where the time of a step goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

HOST = ("data",)
"""Parts in which this process waits for others, and which its own clock measures on every device."""
DEVICE = ("forward", "backward", "optimizer")
"""Parts whose work a GPU does later than it is asked for: measured there by CUDA events."""


class StepClock:
    """Seconds spent in each part of a step, summed until they are taken. An ordinary step does not wait for a GPU.

        with clock.part("forward"):
            ...

    Parts do not nest. On a GPU, a wait for data that its queue of work outlasts costs nothing and is counted all the
    same, so the parts may be more than the whole; then nothing is left for "other".
    """

    def __init__(self, device: torch.device):
        self.events = device.type == "cuda"
        self.recorded: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.free: list[torch.cuda.Event] = []
        self.start()

    def start(self) -> None:
        """Begin anew, now."""
        self.begun = time.perf_counter()
        self.seconds = dict.fromkeys((*HOST, *DEVICE), 0.0)
        self.free += [event for _, *pair in self.recorded for event in pair]
        self.recorded = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self.events and name in DEVICE:
            begin, end = self._event(), self._event()
            begin.record()
            yield
            end.record()
            self.recorded.append((name, begin, end))
        else:
            begun = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - begun

    def _event(self) -> torch.cuda.Event:
        return self.free.pop() if self.free else torch.cuda.Event(enable_timing=True)

    def take(self) -> tuple[float, dict[str, float]]:
        """Seconds since the start, and of each part and "other" in them; then start anew. Waits for the device."""
        for name, begin, end in self.recorded:
            end.synchronize()
            self.seconds[name] += begin.elapsed_time(end) / 1e3
        whole, parts = time.perf_counter() - self.begun, self.seconds
        self.start()
        return whole, {**parts, "other": max(0.0, whole - sum(parts.values()))}
