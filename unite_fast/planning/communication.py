"""Collectives of an optimizer step: how many, of how many bytes, and how long they take."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from unite_fast.config import Config, ModelConfig
from unite_fast.optim.muon import newton_schulz_flops
from unite_fast.optim.sharded_matrices import Grid, Matrix, ShardedMap
from unite_fast.planning import flops, memory
from unite_fast.planning.assumptions import Assumptions, Cluster


@dataclass(frozen=True)
class Collective:
    """One kind of collective in an optimizer step."""

    name: str
    size: float
    """Bytes of the whole tensors."""
    times: int
    """How often these bytes are sent in an optimizer step; an all-reduce counts as two."""
    group: int
    """GPUs in the process group."""
    overlaps: bool
    """Whether it can overlap with compute."""
    across_nodes: bool = False
    """Whether the group has one GPU of each node."""
    calls: int = 0
    """Calls per optimizer step, each with its latency."""
    all_reduce: bool = False
    """NCCL has rings and trees for an all-reduce, and on nodes of several GPUs rings alone for the others."""


@dataclass(frozen=True)
class Groups:
    """Groups of parameters that training/parallelize.shard gathers and reduces together."""

    blocks: int
    """One for each encoder block."""
    layers: int
    """One for each decoder layer."""
    encoder: int = 3
    """Norms, adaLN Linears, the rest."""
    decoder: int = 2
    """Norms, the rest."""
    norm: int = 1
    """The LayerNorm of the latents, if it has weights."""

    @property
    def total(self) -> int:
        return self.blocks + self.layers + self.encoder + self.decoder + self.norm

    @property
    def gathers(self) -> int:
        """All-gathers of a micro-batch if blocks and layers are freed after each forward pass: the tokenizer's and the
        flow's pass through the encoder, the decoder's one."""
        return 2 * (2 * self.blocks + self.layers) + 2 * (self.encoder + self.norm) + self.decoder


def parameter_groups(model: ModelConfig) -> Groups:
    return Groups(model.encoder.depth, model.decoder.depth, norm=model.latent_norm == "layer")


@dataclass(frozen=True)
class MuonCalls:
    """Collectives of Muon in an optimizer step (optim/sharded_matrices.py)."""

    buckets: int
    """Batches of Newton-Schulz of the busiest owner; all-to-alls are two for each."""
    all_gathers: int
    """Between replicas."""


def muon_calls(model: ModelConfig, replicas: int, shards: int) -> MuonCalls:
    """Those of R x S ranks."""
    shapes = tuple(s.shape for s in flops.parameter_shapes(model) if s.muon for _ in range(s.count))
    if replicas * shards >= len(shapes):  # every owner has one matrix
        return MuonCalls(1, int(replicas > 1))
    return _muon_calls(shapes, replicas, shards)


@lru_cache
def _muon_calls(shapes: tuple[tuple[int, ...], ...], replicas: int, shards: int) -> MuonCalls:
    costs = [newton_schulz_flops(shape) for shape in shapes]
    applied = ShardedMap([Matrix(torch.Size(shape)) for shape in shapes], costs, Grid(replicas, shards))
    gathers = sum(start < end for start, end in applied.all_gather_ranges) if replicas > 1 else 0
    return MuonCalls(len(applied.buckets), gathers)


def collectives(config: Config, cluster: Cluster, strategy: str, micro_steps: int) -> list[Collective]:
    """Collectives of an optimizer step: float32 gradients, bfloat16 parameters, bfloat16 updates of Muon."""
    shapes = flops.parameter_shapes(config.model)
    total, muon = flops.numel(shapes), flops.numel([shape for shape in shapes if shape.muon])
    encoder, groups = flops.parameters(config.model)["encoder"], parameter_groups(config.model)
    replicas, shards = mesh(strategy, cluster)
    calls = muon_calls(config.model, replicas, shards)
    if cluster.gpus == 1:
        return []
    if strategy == "ddp":
        gradients, updates = memory.FLOAT * total, memory.HALF * muon
        return [
            Collective("all-reduce of gradients", gradients, 2, replicas, True, calls=groups.total, all_reduce=True),
            Collective("all-gather of Muon's updates", updates, 1, replicas, False, calls=calls.all_gathers),
        ]
    size, times, gathers = memory.HALF * (total + encoder), 2 * micro_steps, groups.gathers * micro_steps
    if not config.parallel.reshard_after_forward:
        size, times, gathers = memory.HALF * total, 1, groups.total  # gathered until the step ends
    matrices = 2 * memory.HALF * muon / shards
    result = [
        Collective("all-gather of parameters", size, times, shards, True, calls=gathers),
        Collective("reduce-scatter of gradients", memory.FLOAT * total, 1, shards, True, calls=groups.total),
        Collective("all-to-all of Muon's matrices", matrices, 1, shards, False, calls=2 * calls.buckets),
        Collective("all-reduce of the gradient's norm", memory.FLOAT, 2, shards, False, calls=1, all_reduce=True),
    ]
    if replicas > 1:
        gradients, updates = (size / shards for size in (memory.FLOAT * total, memory.HALF * muon))
        reduce, gather = "all-reduce of gradients across nodes", "all-gather of Muon's updates across nodes"
        result += [
            Collective(reduce, gradients, 2, replicas, True, True, groups.total, all_reduce=True),
            Collective(gather, updates, 1, replicas, False, True, calls.all_gathers),
        ]
    return result


def mesh(strategy: str, cluster: Cluster) -> tuple[int, int]:
    """Replicas of the training state, and ranks over which each is sharded."""
    gpus = cluster.gpus
    return {"ddp": (gpus, 1), "fsdp": (1, gpus), "hsdp": (cluster.nodes, cluster.gpus_per_node)}[strategy]


def collective_seconds(collective: Collective, cluster: Cluster, assumed: Assumptions) -> float:
    """Seconds of all collectives of one kind in a step. Bytes: within a node each GPU receives the other GPUs' parts
    over its link; across nodes it receives its part over its share of the network. Latency: see `call_seconds`."""
    within, nodes = placed(collective, cluster)
    once = collective.size * (within - 1) / within / (cluster.gpu.link * 1e9)
    once += collective.size * (nodes - 1) / nodes / within / (cluster.gpu.network * 1e9)
    return collective.times * once / assumed.links + collective.calls * call_seconds(collective, cluster, assumed)


def call_seconds(collective: Collective, cluster: Cluster, assumed: Assumptions) -> float:
    """Latency of one call, as NCCL models it (see `Latency`). n GPUs on m nodes take n - m hops within nodes and m - 1
    across in a ring, twice in an all-reduce, or, in a tree, 2 (n / m - 1) within and 2 log2(m) across. An all-to-all
    is counted as a ring."""
    if collective.group == 1:
        return 0.0
    within, nodes = placed(collective, cluster)
    latency = assumed.latency
    ring = (collective.group - nodes) * latency.ring + (nodes - 1) * latency.ring_across
    if not collective.all_reduce:
        return latency.call + ring
    tree = (within - 1) * latency.tree + math.ceil(math.log2(nodes)) * latency.tree_across
    return latency.call + 2 * min(ring, tree)


def placed(collective: Collective, cluster: Cluster) -> tuple[int, int]:
    """GPUs of the group on each node, and its nodes."""
    if collective.across_nodes:
        return 1, cluster.nodes
    return min(collective.group, cluster.gpus_per_node), -(-collective.group // cluster.gpus_per_node)
