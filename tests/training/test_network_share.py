"""The network's share of a step, and the slowest rank."""

import re

import torch

from unite_fast.distributed.launch import join_training
from unite_fast.training import network_share
from unite_fast.training.metrics import Speedometer, straggler
from unite_fast.training.network_share import NetworkShare, measure_network


def test_a_network_that_takes_more_than_a_third_of_a_step_is_told_once(monkeypatch, mentions):
    """4 MB take 0.9 s beside a latency of 0.1 s; so 40 MB take 8 s, and 20 calls 2 s."""
    monkeypatch.setattr(network_share, "_seconds", lambda numbers, device: {1: 0.1, 2**20: 0.9}[numbers])
    found = NetworkShare(10 * 2**20, 20, torch.device("cpu"))
    assert (found.latency, round(found.seconds, 6), found.note(50.0)) == (0.1, 10.0, "")
    assert re.search(mentions("network", "10 s", "50%", 20, "100 ms", "check-cluster"), found.note(20.0))
    assert found.note(20.0) == ""


def _calls(config, strategy: str) -> int:
    with join_training("cpu", 60) as (ranks, device, _):
        found = measure_network(config, strategy, device, ranks)
        return found.calls if found else 0


def test_calls_between_machines_are_counted(ranks, tiny_config):
    """In hsdp only gradients and Muon's updates leave a machine."""
    counts = {strategy: ranks(4, _calls, tiny_config, strategy, nodes=2) for strategy in ("ddp", "fsdp", "hsdp")}
    ddp, fsdp, hsdp = (count for (count, *others) in counts.values() if others == [count] * 3)
    assert fsdp > ddp > 0 and fsdp > hsdp > 0
    assert ranks(2, _calls, tiny_config, "ddp", nodes=1) == [0, 0], "one machine"


def _slowest(config, nodes: int) -> dict:
    with join_training("cpu", 60) as (ranks, device, _):
        return Speedometer(config, device).slowest([1.0, 4.0, 2.0][ranks.rank])


def test_the_slowest_rank_is_in_each_row(ranks, tiny_config, mentions):
    for row in ranks(3, _slowest, tiny_config, 1):
        assert (row["slowest_rank"], row["slowest_ratio"]) == (1, 2.0) and row["slowest_host"]
        assert re.search(mentions("rank 1", "2.0 x"), straggler(row))
    assert straggler({"slowest_rank": 1, "slowest_ratio": 1.2}) == straggler({}) == ""
    assert Speedometer(tiny_config, torch.device("cpu")).slowest(3.0) == {}
