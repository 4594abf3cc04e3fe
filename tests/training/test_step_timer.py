"""Seconds of a step by part."""

import time
from typing import ClassVar

import pytest
import torch

from unite_fast.training import step_timer
from unite_fast.training.step_timer import StepClock


def test_parts_and_other_add_up_to_the_whole(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: now[0])
    clock = StepClock(torch.device("cpu"))
    for spent, name in ((1, "data"), (2, "forward"), (4, "backward"), (8, "optimizer"), (16, None), (32, "forward")):
        if name is None:
            now[0] += spent
        else:
            with clock.measure(name):
                now[0] += spent
    assert clock.take() == (63, {"data": 1, "forward": 34, "backward": 4, "optimizer": 8, "other": 16})
    now[0] += 5
    assert clock.take() == (5, {"data": 0, "forward": 0, "backward": 0, "optimizer": 0, "other": 5})
    now[0] += 7
    clock.start()
    assert clock.take()[0] == 0


class Event:
    """Stands in for a CUDA event, on a device that runs half a second behind the host."""

    created = 0
    synchronized: ClassVar[list] = []

    def __init__(self, enable_timing: bool):
        assert enable_timing
        Event.created += 1

    def record(self) -> None:
        self.time = time.perf_counter() + 0.5

    def synchronize(self) -> None:
        Event.synchronized.append(self)

    def elapsed_time(self, end: "Event") -> float:
        return (end.time - self.time) * 1e3


def test_the_host_waits_for_a_gpu_only_when_seconds_are_taken(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = StepClock(torch.device("cuda"))
    for _ in range(3):
        with clock.measure("data"):
            now[0] += 1
        with clock.measure("forward"):
            now[0] += 2
    assert Event.created == 6 and not Event.synchronized
    whole, parts = clock.take()
    assert (whole, parts["data"], parts["forward"], parts["other"]) == (9, 3, pytest.approx(6), pytest.approx(0))
    assert len(Event.synchronized) == 3
    # The next interval reuses the events.
    for _ in range(3):
        with clock.measure("backward"):
            now[0] += 1
    assert clock.take()[1]["backward"] == pytest.approx(3) and Event.created == 6


@pytest.mark.gpu
def test_gpu_time_is_measured_and_not_launch_time():
    clock = StepClock(torch.device("cuda"))
    a = torch.randn(4096, 4096, device="cuda")
    a @ a
    torch.cuda.synchronize()
    start = time.perf_counter()
    with clock.measure("forward"):
        for _ in range(50):
            a @ a
    launching = time.perf_counter() - start
    _, parts = clock.take()
    assert parts["forward"] > 2 * launching
