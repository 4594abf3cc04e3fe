"""Where a step's time goes, kernel by kernel, by torch's profiler."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from unite_fast.benchmarking.product_rate import synchronize

STEPS = 2
"""Steps that are traced; a trace slows them, so none of them is timed."""
COUNT = 20


def top_kernels(take_step: Callable[[], None], device: torch.device) -> list[dict]:
    """The kernels that take most time, most first: name, ms a step, calls a step, and share of all kernels' time. On a
    CPU, PyTorch's operators, each without those that it calls."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as trace:
        for _ in range(STEPS):
            take_step()
        synchronize(device)
    found = []
    for event in trace.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        # Annotations span kernels that are listed themselves.
        if on_gpu != cuda or getattr(event, "is_user_annotation", False):
            continue
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        found.append((microseconds, event.key, event.count))
    whole = sum(microseconds for microseconds, *_ in found) or 1.0
    return [
        {"name": name, "ms": us / STEPS / 1e3, "calls": calls / STEPS, "share": us / whole}
        for us, name, calls in sorted(found, reverse=True)[:COUNT]
    ]
