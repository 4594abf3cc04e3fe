"""How much of a step the network takes, measured once at the start of a run on several machines."""

import time

import torch
from torch import distributed

from unite_fast.distributed.process_group import Ranks

PROBE_BYTES = 2**22
"""Of the all-reduce that is timed: the bandwidth shows, and a slow network needs seconds."""
LARGE_SHARE = 1 / 3
"""Share of a step from which the network is worth a line."""


class NetworkShare:
    """Seconds that the network needs for the gradients of a step, estimated from one small and one large all-reduce.

    Attributes:
        latency: seconds of an all-reduce of one number.
        gradients: seconds of an all-reduce of float32 gradients of all parameters.
    """

    def __init__(self, parameters: int, device: torch.device):
        """All ranks call this together.

        Args:
            parameters: of the model.
        """
        self.told = False
        _seconds(1, device)  # connects
        self.latency = _seconds(1, device)
        numbers = min(parameters, PROBE_BYTES // 4)
        large = _seconds(numbers, device)
        self.gradients = self.latency + max(0.0, large - self.latency) * parameters / numbers

    def note(self, step_seconds: float) -> str:
        """A line the first time that the network takes more than a third of a step; else empty."""
        share = self.gradients / step_seconds
        if self.told or share < LARGE_SHARE:
            return ""
        self.told = True
        return (
            f"network: the gradients take about {self.gradients:.2g} s to reduce, {min(share, 1):.0%} of a step "
            f"(latency {self.latency * 1e3:.3g} ms); unite-fast check-cluster shows which machine is slow"
        )


def _seconds(numbers: int, device: torch.device) -> float:
    tensor = torch.zeros(numbers, device=device)
    _synchronize(device)
    started_at = time.perf_counter()
    distributed.all_reduce(tensor)
    _synchronize(device)
    return time.perf_counter() - started_at


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_network(parameters: int, device: torch.device, ranks: Ranks) -> NetworkShare | None:
    """None within one machine. All ranks call this together."""
    return NetworkShare(parameters, device) if ranks.nodes > 1 else None
