"""What a plan assumes of GPUs, links and hosts: two sets, the fast and the slow end of the range."""

from dataclasses import dataclass

from unite_fast.errors import require
from unite_fast.planning.gpus import GPU


@dataclass(frozen=True)
class Latency:
    """Seconds of a collective besides its bytes: once a call, and for each hop of a ring or tree within and across
    nodes. The figures are those by which NCCL chooses its algorithms, `baseLat` and `hwLat` (NVLink, network) in
    https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc, without what it adds for some CPUs and switches."""

    call: float
    ring: float
    ring_across: float
    tree: float
    tree_across: float


LL128 = Latency(14e-6, ring=1.9e-6, ring_across=4.0e-6, tree=1.25e-6, tree_across=8.5e-6)
SIMPLE = Latency(8.4e-6, ring=3.4e-6, ring_across=14e-6, tree=4.0e-6, tree_across=14e-6)
"""NCCL's two protocols for messages of megabytes."""


@dataclass(frozen=True)
class Assumptions:
    """Achieved shares of the published rates, latencies, and the host's time."""

    name: str
    matmul: float
    attention: float
    convolutions: float
    memory: float
    links: float
    """For links within a node and for the network."""
    overlap: bool
    """Whether communication overlaps with backward where it can."""
    imbalance: float
    """Newton-Schulz FLOPs of the busiest GPU over an even share."""
    latency: Latency
    launch: float
    """Seconds of the host for each kernel: Python, autograd, dispatcher, driver. Slow: benchmarks/host_time.py took 93
    to 102 ms for the 1,367 kernels of a micro-batch of B on a shared AVX2 core of 2024, plus 3 us for the driver. Fast:
    an operator of eager PyTorch takes 5 to 25 us on a server's CPU, the driver included
    (https://jiahuanglin.xyz/all_lessons/gpu_kernel_serving/18_pytorch_to_kernel.html)."""


FAST = Assumptions(
    "fast",
    matmul=0.65,
    attention=0.40,
    convolutions=0.50,
    memory=0.85,
    links=0.8,
    overlap=True,
    imbalance=1.0,
    latency=LL128,
    launch=20e-6,
)
SLOW = Assumptions(
    "slow",
    matmul=0.45,
    attention=0.25,
    convolutions=0.35,
    memory=0.65,
    links=0.5,
    overlap=False,
    imbalance=2.0,
    latency=SIMPLE,
    launch=75e-6,
)


@dataclass(frozen=True)
class Cluster:
    gpu: GPU
    nodes: int
    gpus_per_node: int

    def __post_init__(self):
        require(self.nodes > 0 and self.gpus_per_node > 0, "--nodes and --gpus-per-node must be positive")
        require(self.gpus <= 10**6, "--nodes times --gpus-per-node must be at most 1,000,000")

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node
