"""All-reduces by size, and links to rank 0."""

from dataclasses import replace

import pytest
import torch

from unite_fast.cluster_check import network
from unite_fast.cluster_check.network import all_reduce_by_size, bus_bandwidth, link_speeds
from unite_fast.distributed.launch import ranks_of_torchrun
from unite_fast.errors import UserError

CPU = torch.device("cpu")


def test_bus_bandwidth():
    # Two ranks send each byte once; many send it nearly twice.
    assert bus_bandwidth(10**9, 0.5, 2) == 2e9
    assert bus_bandwidth(10**9, 1.0, 4) == pytest.approx(1.5e9)


def measure() -> tuple:
    with ranks_of_torchrun(CPU) as ranks:
        rows = all_reduce_by_size(ranks, CPU, (8, 2**16, 2**20))
        links = link_speeds(ranks, [0, 1, 2], CPU, 30)
        late = link_speeds(ranks, [0, 1, 2], CPU, -1)
        few = link_speeds(ranks, [0, 2], CPU, 30)
        with pytest.raises(UserError):
            all_reduce_by_size(replace(ranks, world=5), CPU, (8,))
        network.LONGEST = 0.0
        short = all_reduce_by_size(ranks, CPU, (8, 2**16, 2**20))
        return rows, links, late, few, short


def test_three_ranks(ranks, monkeypatch):
    monkeypatch.setattr(network, "TIMED", 0.02)
    monkeypatch.setattr(network, "PAYLOADS", (2**10, 2**16))
    results = ranks(3, measure)
    rows, links, late, few, short = results[0]
    assert [row["bytes"] for row in rows] == [8, 2**16, 2**20]
    assert [row["bytes"] for row in short] == [8, 2**16], "latency alone stops nothing, a slow size does"
    for row in rows:
        assert row["bus_bandwidth"] == pytest.approx(row["bytes"] / row["seconds"] * 4 / 3)
    assert all(other[0] == rows for other in results), "all ranks decide by the same times"
    assert sorted(links) == [1, 2] and sorted(few) == [2] and late == {}
    assert all(link["latency"] > 0 and link["bandwidth"] > 0 for link in links.values())
    assert [other[1] for other in results[1:]] == [{}, {}]
