"""The network's share of a step, and the slowest rank."""

import re

import torch

from unite_fast.distributed.launch import join_training
from unite_fast.training import network_share
from unite_fast.training.metrics import Speedometer, straggler
from unite_fast.training.network_share import measure_network


def _share(seconds: dict[int, float]) -> list:
    with join_training("cpu", 60) as (ranks, device, _):
        network_share._seconds = lambda numbers, device: seconds[numbers]
        found = measure_network(10 * 2**20, device, ranks)
        return [found.latency, found.gradients, found.note(40.0), found.note(10.0), found.note(10.0)]


def test_a_network_that_takes_more_than_a_third_of_a_step_is_told_once(ranks, mentions):
    """4 MB take 0.9 s beside a latency of 0.1 s, so 40 MB take 8.1 s."""
    for latency, gradients, fast, slow, again in ranks(2, _share, {1: 0.1, 2**20: 0.9}, nodes=2):
        assert (latency, round(gradients, 6), fast, again) == (0.1, 8.1, "", "")
        assert re.search(mentions("network", "8.1 s", "81%", "100 ms", "check-cluster"), slow)


def test_one_machine_has_no_network():
    assert measure_network(100, torch.device("cpu"), network_share.Ranks()) is None


def _slowest(config, nodes: int) -> dict:
    with join_training("cpu", 60) as (ranks, device, _):
        return Speedometer(config, device).slowest([1.0, 4.0, 2.0][ranks.rank])


def test_the_slowest_rank_is_in_each_row(ranks, tiny_config, mentions):
    for row in ranks(3, _slowest, tiny_config, 1):
        assert (row["slowest_rank"], row["slowest_ratio"]) == (1, 2.0) and row["slowest_host"]
        assert re.search(mentions("rank 1", "2.0 x"), straggler(row))
    assert straggler({"slowest_rank": 1, "slowest_ratio": 1.2}) == straggler({}) == ""
    assert Speedometer(tiny_config, torch.device("cpu")).slowest(3.0) == {}
