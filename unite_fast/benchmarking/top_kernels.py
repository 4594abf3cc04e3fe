"""Time of a step by kernel, from torch's profiler."""

from collections.abc import Callable

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage] (documented, not in __all__)
from torch.profiler import ProfilerActivity, profile

from unite_fast.benchmarking.matmul_rate import synchronize

STEPS = 2
"""Traced steps; tracing slows them, so they are not timed."""
COUNT = 20


def top_kernels(take_step: Callable[[], None], device: torch.device) -> list[dict]:
    """The slowest kernels, slowest first: name, ms per step, calls per step, and share of the time of all kernels. On a
    CPU, PyTorch's operators, each without the operators it calls."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as trace:
        for _ in range(STEPS):
            take_step()
        synchronize(device)
    times = []
    for event in trace.key_averages():
        on_gpu = event.device_type == DeviceType.CUDA
        # Annotations contain kernels that are listed themselves.
        if on_gpu != cuda or getattr(event, "is_user_annotation", False):
            continue
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        times.append((microseconds, event.key, event.count))
    whole = sum(microseconds for microseconds, *_ in times) or 1.0
    return [
        {"name": name, "ms": us / STEPS / 1e3, "calls": calls / STEPS, "share": us / whole}
        for us, name, calls in sorted(times, reverse=True)[:COUNT]
    ]
