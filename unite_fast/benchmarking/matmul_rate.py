"""Measured matmul rate of a device: the denominator of the measured MFU."""

import time
from collections.abc import Callable

import torch


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16, seconds: float = 0.5) -> float:
    """FLOP/s of a large matmul as in a Linear, the best within `seconds`."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        best = min(best, timed(lambda: torch.nn.functional.linear(a, b), device))
    return 2 * side**3 / best


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, including its work on the device."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
