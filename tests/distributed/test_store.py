"""The store: ranks of a start find each other in it, also after a restart."""

import os
import re
import time
from collections.abc import Callable

import pytest
import torch
from torch import distributed

from unite_fast.distributed.peers import Peers
from unite_fast.distributed.store import (
    LostContact,
    MistakeElsewhere,
    announce_early_mistake,
    fresh_store,
    gather,
    open_store,
    wait_for,
)


def _join_in_stale_store(join: Callable[[], Peers], after_rendezvous: bool) -> list[int]:
    """Restart as torchrun does, in the store of a start that was killed before or after it exchanged addresses."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Keeps the store's server alive, as torchrun's agent does.
    server = open_store(30.0)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    if after_rendezvous:
        # In the earlier start all confirmed, and published their addresses.
        server.set(f"start/{rank}", f"dead{rank}")
        server.set("start/proposal", "dead0,dead1,dead2")
        server.set(f"start/confirmed/{rank}", "dead0,dead1,dead2")
        server.set("start/accepted", "dead0,dead1,dead2")
        server.set("start dead0/addresses", "gone")
    # Rank 0 first, while the others' old tokens are there; or last.
    time.sleep(0.4 * (rank + 1 if after_rendezvous else world - rank))
    peers = join()
    sums = torch.tensor([rank])
    distributed.all_reduce(sums)
    distributed.barrier()
    return [int(sums), *peers.votes.start_max(rank).result()]


@pytest.mark.parametrize("after_rendezvous", [False, True])
def test_ranks_find_each_other_in_the_store_of_a_killed_start(ranks, join, after_rendezvous):
    assert ranks(3, _join_in_stale_store, join, after_rendezvous) == [[3, 2]] * 3


def _start_one_of_two() -> str:
    os.environ["WORLD_SIZE"] = "2"
    with pytest.raises(LostContact) as lost:
        fresh_store(1.0)
    return str(lost.value)


def test_a_rank_that_does_not_start_is_an_error(ranks, mentions):
    (message,) = ranks(1, _start_one_of_two)
    assert re.search(mentions("2 processes", "1 s"), message)


def test_a_store_that_cannot_be_reached_is_named(ranks, mentions):
    def start() -> str:
        os.environ |= {"RANK": "1", "WORLD_SIZE": "2"}
        with pytest.raises(LostContact) as lost:
            open_store(1.0)
        return str(lost.value)

    (message,) = ranks(1, start)
    assert re.search(mentions("rank 0", os.uname().nodename, "port", "1 s"), message)


def _gather() -> list[list[str]]:
    rank = int(os.environ["RANK"])
    store = fresh_store(30.0)
    texts = gather(store, "name", f"host {rank}", rank, 3, 30.0)
    store.set(f"end/{rank}", "")
    if rank == 0:
        wait_for(store, [f"end/{other}" for other in range(3)], 30.0)
    return texts


def test_texts_are_gathered_in_rank_order(ranks):
    assert ranks(3, _gather) == [["host 0", "host 1", "host 2"]] * 3


def _end_before_joining(failing: int) -> str:
    """The failing rank ends by a mistake; the others wait for it."""
    if int(os.environ["RANK"]) == failing:
        announce_early_mistake("train.bacth_size is unknown", 20.0)
        return ""
    with pytest.raises(MistakeElsewhere) as found:
        fresh_store(30.0)
    return str(found.value)


@pytest.mark.parametrize("failing", [0, 2])
def test_a_mistake_before_joining_ends_the_others(ranks, mentions, failing):
    start = time.monotonic()
    messages = ranks(3, _end_before_joining, failing, nodes=3)
    assert time.monotonic() - start < 25
    for rank, message in enumerate(messages):
        assert bool(message) == (rank != failing)
        assert not message or re.search(mentions(f"rank {failing} on", "train.bacth_size"), message)
