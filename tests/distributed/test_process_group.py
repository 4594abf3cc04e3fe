"""Collectives of numbers and objects, over several ranks and in one process."""

import pytest
import torch
from torch import distributed

from unite_fast.distributed.process_group import Ranks, current_ranks
from unite_fast.errors import UserError


def _collectives() -> list:
    distributed.init_process_group("gloo")
    ranks = current_ranks()
    own = ranks.with_own_group()
    total = own.sum(torch.tensor([ranks.rank + 1]))
    return [
        own.gather(f"rank {ranks.rank}"),
        own.broadcast(ranks.rank + 5),
        *own.start_max(10 - ranks.rank).result(),
        int(total),
        own.run_on_all(lambda: ranks.rank**2),
        own.run_on_first(lambda: ranks.rank + 7),
    ]


def test_collectives(ranks):
    assert ranks(3, _collectives) == [[["rank 0", "rank 1", "rank 2"], 5, 10, 6, [0, 1, 4], 7]] * 3


def _error(kind: type[Exception]) -> str:
    distributed.init_process_group("gloo")
    ranks = current_ranks()

    def work() -> None:
        if ranks.rank > 0:
            raise kind(f"on rank {ranks.rank}")

    with pytest.raises(Exception) as caught:
        ranks.run_on_all(work)
    return f"{caught.type.__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("kind", "message"),
    [(UserError, "UserError: on rank 1"), (KeyError, "RuntimeError: KeyError: 'on rank 1'")],
)
def test_an_error_on_one_rank_is_raised_on_all(ranks, kind, message):
    assert ranks(3, _error, kind) == [message] * 3


def test_collectives_of_one_process_need_no_group():
    single = current_ranks()
    assert single == Ranks() and single.main
    single.wait()
    assert single.gather("x") == ["x"] and single.broadcast("x") == "x"
    assert single.start_max(3, 5).result() == [3, 5] and single.run_on_first(lambda: 4) == 4
    assert single.with_own_group() is single


def test_ranks_from_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_environment() == Ranks()
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    ranks = Ranks.from_environment()
    assert (ranks.rank, ranks.world, ranks.local_rank, ranks.per_node, ranks.nodes) == (5, 8, 1, 4, 2)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_batches_are_the_same_for_every_world_size(world):
    batches = [batch for rank in range(world) for batch in Ranks(rank, world).batches(10, 3)]
    assert sorted(batches, key=lambda batch: batch.start) == [range(0, 3), range(3, 6), range(6, 9), range(9, 10)]
