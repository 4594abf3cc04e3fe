"""Which strategy is chosen, and how the batch is split over ranks."""

import pytest

from unite_fast.config import ParallelConfig
from unite_fast.distributed.process_group import Ranks
from unite_fast.distributed.strategy import choose_strategy, split_batch
from unite_fast.errors import UserError

GB = 10**9


@pytest.mark.parametrize(
    ("strategy", "ranks", "state", "memory", "name", "mesh"),
    [
        ("auto", Ranks(), GB, GB, "none", (1, 1)),
        ("auto", Ranks(world=8, per_node=8), 20 * GB, 80 * GB, "ddp", (8, 1)),
        ("auto", Ranks(world=8, per_node=8), 20 * GB + 1, 80 * GB, "fsdp", (1, 8)),
        ("auto", Ranks(world=32, per_node=8), 20 * GB, 80 * GB, "ddp", (32, 1)),
        ("auto", Ranks(world=32, per_node=8), 21 * GB, 80 * GB, "hsdp", (4, 8)),
        ("fsdp", Ranks(world=32, per_node=8), GB, 80 * GB, "fsdp", (1, 32)),
        ("ddp", Ranks(world=8, per_node=8), 70 * GB, 80 * GB, "ddp", (8, 1)),
        ("hsdp", Ranks(world=16, per_node=4), GB, 80 * GB, "hsdp", (4, 4)),
    ],
)
def test_the_strategy_depends_on_state_size_and_machines(strategy, ranks, state, memory, name, mesh):
    chosen = choose_strategy(ParallelConfig(strategy=strategy), ranks, state, memory)
    assert (chosen.name, chosen.mesh) == (name, mesh)
    if strategy == "auto" and ranks.world > 1:
        assert f"{state / 1e9:.2f} GB" in chosen.why and "20.0 GB" in chosen.why


def test_hsdp_needs_the_same_number_of_processes_on_each_machine(mentions):
    with pytest.raises(UserError, match=mentions("hsdp", 12, 8, "parallel.strategy=fsdp")):
        choose_strategy(ParallelConfig(strategy="hsdp"), Ranks(world=12, per_node=8), GB, GB)


def test_each_rank_gets_its_slice_and_a_micro_batch_that_divides_it(mentions):
    assert split_batch(Ranks(rank=2, world=4), 64, 0) == (slice(32, 48), 16)
    assert split_batch(Ranks(rank=3, world=4), 64, 8) == (slice(48, 64), 8)
    assert split_batch(Ranks(rank=1, world=64), 1024, 64) == (slice(16, 32), 16)
    with pytest.raises(UserError, match=mentions("train.batch_size", 64, 3)):
        split_batch(Ranks(world=3), 64, 0)
    with pytest.raises(UserError, match=mentions("train.micro_batch", 6, 16, "train.batch_size")):
        split_batch(Ranks(world=4), 64, 6)
