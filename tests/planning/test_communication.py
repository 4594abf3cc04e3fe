"""Collectives of a step: their bytes, their number, their latency."""

from collections import Counter
from dataclasses import replace
from math import log2

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unite_fast.data_pipeline import Batch
from unite_fast.distributed.launch import join_training
from unite_fast.distributed.strategy import split_batch
from unite_fast.planning import flops
from unite_fast.planning.assumptions import FAST, LL128, SIMPLE, SLOW, Cluster
from unite_fast.planning.communication import (
    Collective,
    MuonCalls,
    call_seconds,
    collective_seconds,
    collectives,
    mesh,
    muon_calls,
    parameter_groups,
)
from unite_fast.planning.gpus import find_gpu
from unite_fast.planning.launches import gradient_additions, weight_copies
from unite_fast.recipes import load_config
from unite_fast.training.parallelize import build_model
from unite_fast.training.train_state import TrainState
from unite_fast.training.train_step import TrainStep

FOUR_NODES = Cluster(find_gpu("h100"), nodes=4, gpus_per_node=8)


def test_collectives_take_the_time_of_their_bytes():
    links, network = 450e9, 50e9
    one = Collective("all-gather", 8e9, times=3, group=32, overlaps=True)
    # 7/8 over links; across nodes each GPU receives an eighth of the 3/4 that other nodes hold.
    expected = 3 * (8e9 * 7 / 8 / links + 8e9 * 3 / 4 / 8 / network) / FAST.links
    assert collective_seconds(one, FOUR_NODES, FAST) == pytest.approx(expected)
    within = Collective("all-gather", 8e9, times=1, group=8, overlaps=True)
    assert collective_seconds(within, FOUR_NODES, SLOW) == pytest.approx(8e9 * 7 / 8 / links / SLOW.links)
    across = Collective("all-reduce", 8e9, times=2, group=4, overlaps=True, across_nodes=True)
    assert collective_seconds(across, FOUR_NODES, SLOW) == pytest.approx(2 * 8e9 * 3 / 4 / network / SLOW.links)


def test_each_call_costs_the_hops_of_its_ring_or_tree():
    def one(group: int, **others) -> Collective:
        return Collective("one", 0.0, times=1, group=group, overlaps=False, calls=5, **others)

    # 28 hops within the four nodes and 3 between them; an all-reduce goes down and up a tree.
    assert call_seconds(one(32), FOUR_NODES, FAST) == pytest.approx(14e-6 + 28 * 1.9e-6 + 3 * 4e-6)
    tree = 14e-6 + 2 * (7 * 1.25e-6 + 2 * 8.5e-6)
    assert call_seconds(one(32, all_reduce=True), FOUR_NODES, FAST) == pytest.approx(tree)
    across = one(4, across_nodes=True)
    assert call_seconds(across, FOUR_NODES, SLOW) == pytest.approx(8.4e-6 + 3 * 14e-6)
    assert collective_seconds(across, FOUR_NODES, SLOW) == pytest.approx(5 * call_seconds(across, FOUR_NODES, SLOW))
    # Two nodes of one GPU: the ring's 2 x 4 us are less than the tree's 2 x 8.5.
    pair = Cluster(find_gpu("h100"), nodes=2, gpus_per_node=1)
    assert call_seconds(one(2, all_reduce=True), pair, FAST) == pytest.approx(14e-6 + 2 * 4e-6)
    assert call_seconds(one(1), FOUR_NODES, SLOW) == 0
    # At 512 GPUs a tree's latency grows with the logarithm of the nodes, a ring's with the GPUs.
    many = Cluster(find_gpu("h100"), nodes=64, gpus_per_node=8)
    for latency, assumed in ((LL128, FAST), (SIMPLE, SLOW)):
        tree = 2 * (7 * latency.tree + log2(64) * latency.tree_across)
        assert call_seconds(one(512, all_reduce=True), many, assumed) == pytest.approx(latency.call + tree)
        assert call_seconds(one(512), many, assumed) > 4 * call_seconds(one(512, all_reduce=True), many, assumed)


OPERATORS = {
    "all-gather": "_allgather_base_",
    "reduce-scatter": "_reduce_scatter_base_",
    "all-reduce": "allreduce_",
    "all-to-all": "alltoall_base_",
    "all-gather of lists": "allgather_",
}


class Calls(TorchDispatchMode):
    """Counts collectives, and what FSDP does to single parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        counts = self.collectives if function.namespace == "c10d" else self.others
        counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def called(config, changes: list[dict]) -> list[tuple[Counter, Counter]]:
    """What a step after the first calls, for each change of `parallel`: collectives, and operators of the passes."""
    counts = []
    with join_training("cpu", 60) as (ranks, device, _):
        share, micro_batch = split_batch(ranks, config.train.batch_size, config.train.micro_batch)
        size = share.stop - share.start
        batch = Batch(torch.zeros(size, 3, 8, 8, dtype=torch.uint8), torch.zeros(size, dtype=torch.int64), [])
        for change in changes:
            changed = replace(config, parallel=replace(config.parallel, **change))
            model, strategy = build_model(changed, ranks, device)
            step = TrainStep(TrainState(model, changed), changed, share, micro_batch, strategy=strategy)
            step(batch)
            with Calls() as calls:
                step.accumulate(batch)
                passes = calls.others.copy()
                step.state.apply_gradients()
            counts.append((calls.collectives, passes))
    return counts


@pytest.mark.parametrize(("world", "nodes", "strategies"), [(2, 1, ("ddp", "fsdp")), (4, 2, ("hsdp",))])
def test_the_number_of_calls_is_that_of_a_real_step(world, nodes, strategies, tiny_run, ranks):
    micro_steps, cluster = 3, Cluster(find_gpu("h100"), nodes, world // nodes)
    sizes = f"train.batch_size={micro_steps * world}", "train.micro_batch=1"
    config = load_config("digits", (*tiny_run, *sizes, "train.precision=float32", "optim.muon_dtype=float32"))
    changes = [{"strategy": name, "reshard_after_forward": each} for name in strategies for each in (True, False)]
    (all_counts, *_) = ranks(world, called, config, changes, nodes=nodes)
    for change, (counts, passes) in zip(changes, all_counts, strict=True):
        strategy, changed = change["strategy"], replace(config, parallel=replace(config.parallel, **change))
        expected = Counter()
        for one in collectives(changed, cluster, strategy, micro_steps):
            # Muon's all-gather has lists of tensors.
            kind = one.name.split(" of ")[0] if "updates" not in one.name else "all-gather of lists"
            expected[OPERATORS[kind]] += one.calls
        groups = parameter_groups(config.model).total
        if strategy == "fsdp":  # torch also reduces over groups of one, which costs no hops
            expected["allreduce_"] += groups
        assert counts == expected, change
        assert passes["add_"] == gradient_additions(config.model, micro_steps)
        # One more for each group's reduced gradients, and one of the batch.
        assert passes["copy_"] == weight_copies(config.model, mesh(strategy, cluster)) + groups + 1


def test_groups_and_calls_of_unite_b():
    model = load_config("imagenet256_b").model
    groups = parameter_groups(model)
    # 12 blocks, 12 layers; norms, adaLN and the rest of the encoder; norms and the rest of the decoder; the LayerNorm.
    assert (groups.total, groups.gathers) == (30, 2 * (24 + 12) + 2 * 4 + 2)
    plain = load_config("imagenet256_b", ("model.latent_norm=layer_plain",)).model
    assert parameter_groups(plain).total == 29
    matrices = sum(shape.count for shape in flops.parameter_shapes(model) if shape.muon)
    assert muon_calls(model, 1, 1).all_gathers == 0 and muon_calls(model, 1, 1).buckets == 10
    # With a rank for each matrix there is one batch, and one all-gather.
    for replicas in (matrices, 512):
        assert muon_calls(model, replicas, 1) == MuonCalls(buckets=1, all_gathers=1)
    assert muon_calls(model, 1, 512).all_gathers == 0
    assert muon_calls(model, 1, 8).buckets == muon_calls(model, 8, 1).buckets > 1


def test_one_gpu_has_no_collectives():
    assert collectives(load_config("imagenet256_b"), Cluster(find_gpu("h100"), 1, 1), "ddp", 16) == []
