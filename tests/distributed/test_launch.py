"""Starting and joining a group of ranks: devices, rendezvous after a restart, names of launches."""

import os
import re
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from torch import distributed

from unite_fast.distributed.launch import fresh_store, join_training, launch_name
from unite_fast.distributed.peers import LostContact, Peers
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError


def _join_in_stale_store(join: Callable[[], Peers], after_rendezvous: bool) -> list[int]:
    """Restart as torchrun does, in the store of a start that was killed before or after it exchanged addresses."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Keeps the store's server alive, as torchrun's agent does.
    server = next(distributed.rendezvous("env://", timeout=timedelta(seconds=30)))[0]
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    if after_rendezvous:
        # In the earlier start rank 1 confirmed and published its address; rank 2 was killed before it joined.
        server.set(f"start/{rank}", f"dead{rank}")
        server.set("start/proposal", "dead0,dead1")
        server.set("start/confirmed/1", "dead0,dead1")
        server.set("start/accepted", "dead0,dead1")
        server.set("start dead0/addresses", "gone")
    time.sleep(0.3 * (world - rank))  # the last rank first
    peers = join()
    sums = torch.tensor([rank])
    distributed.all_reduce(sums)
    distributed.barrier()
    return [int(sums), peers.votes.start_max(rank).result()]


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


def test_more_processes_than_cuda_devices_is_an_error(monkeypatch, mentions):
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(UserError, match=mentions("2 processes", "1 CUDA")),
        join_training("cuda", 1),
    ):
        pass


def test_one_process_joins_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with join_training("cpu", 1) as (ranks, device):
        assert (ranks, device) == (Ranks(), torch.device("cpu"))
        assert ranks.main and not torch.distributed.is_initialized()
        assert ranks.gather("all") == ["all"]


def test_a_launch_without_a_name_is_identified_by_its_parent_process(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launch_name().endswith(f"-{os.getppid()}")
