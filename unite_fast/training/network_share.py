"""How much of a step the network takes, measured once at the start of a run on several machines."""

import time

import torch
from torch import distributed

from unite_fast.config import Config
from unite_fast.distributed.process_group import Ranks
from unite_fast.planning import flops
from unite_fast.planning.assumptions import Cluster
from unite_fast.planning.communication import Collective, collectives
from unite_fast.planning.gpus import GPUS

PROBE_BYTES = 2**22
"""Of the all-reduce that is timed: the bandwidth shows, and a slow network needs seconds."""
LARGE_SHARE = 0.25
"""Share of a step from which the network is worth a line. The estimate is low: about a third of the step."""


class NetworkShare:
    """Seconds of a step in the network, estimated from one small and one large all-reduce: the latency of each call
    between machines, and the float32 gradients of all parameters.

    Attributes:
        latency: seconds of an all-reduce of one number.
        seconds: of a step.
    """

    def __init__(self, parameters: int, calls: int, device: torch.device):
        """All ranks call this together.

        Args:
            parameters: of the model.
            calls: collectives between machines in a step.
        """
        self.told = False
        _seconds(1, device)  # connects
        self.latency = _seconds(1, device)
        numbers = min(parameters, PROBE_BYTES // 4)
        large = _seconds(numbers, device)
        self.calls = calls
        self.seconds = calls * self.latency + max(0.0, large - self.latency) * parameters / numbers

    def note(self, step_seconds: float) -> str:
        """A line the first time that the network takes more than a third of a step; else empty."""
        share = self.seconds / step_seconds
        if self.told or share < LARGE_SHARE:
            return ""
        self.told = True
        return (
            f"network: at least {self.seconds:.2g} s of a step, {min(share, 1):.0%}: {self.calls} collectives with a "
            f"latency of {self.latency * 1e3:.3g} ms, and the gradients; unite-fast check-cluster finds a slow machine"
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


def measure_network(config: Config, strategy: str, device: torch.device, ranks: Ranks) -> NetworkShare | None:
    """None within one machine. All ranks call this together.

    Args:
        strategy: ddp, fsdp or hsdp.
    """
    if ranks.nodes == 1:
        return None
    # The numbers of calls do not depend on the GPU.
    cluster = Cluster(GPUS[0], ranks.nodes, ranks.per_node)
    share = config.train.batch_size // ranks.world
    micro_steps = max(1, share // (config.train.micro_batch or share))
    across = (one for one in collectives(config, cluster, strategy, micro_steps) if _leaves_the_machine(one, ranks))
    parameters = flops.numel(flops.parameter_shapes(config.model))
    return NetworkShare(parameters, sum(one.calls for one in across), device)


def _leaves_the_machine(collective: Collective, ranks: Ranks) -> bool:
    return collective.across_nodes or collective.group > ranks.per_node
