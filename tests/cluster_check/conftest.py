"""A cluster of three hosts without faults, for the pure functions."""

from collections.abc import Callable

import pytest

from unite_fast.cluster_check.records import Cluster, Host


def healthy_facts(name: str, address: str) -> dict:
    return {
        "name": name,
        "interfaces": {
            "lo": {"addresses": ["127.0.0.1", "::1"], "state": "unknown", "speed": 0},
            "eth0": {"addresses": [address], "state": "up", "speed": 10_000},
        },
        "infiniband": {},
        "own_addresses": [address],
        "master": {"name": "node1", "addresses": ["10.0.0.1"]},
        "descriptors": {"soft": 4096, "hard": 4096},
        "locked_memory": -1,
        "cpu": "a processor",
        "cores": 8,
        "memory": 64 * 10**9,
        "shared_memory": {"size": 2**34, "free": 2**34},
        "gpus": [],
        "software": {
            "torch": "2.13.0",
            "nccl": "",
            "triton": "3.9.0",
            "unite_fast source": "abc",
            "kernel": f"6.1 {name}",
        },
        "environment": {"OMP_NUM_THREADS": "4"},
    }


@pytest.fixture
def cluster() -> Cluster:
    """node1 to node3, two processes on each."""
    hosts = []
    for index in range(3):
        name, ranks = f"node{index + 1}", [2 * index, 2 * index + 1]
        host = Host(name, ranks, healthy_facts(name, f"10.0.0.{index + 1}"))
        host.devices = [{"host": name, "device": "cpu", "device_error": "", "leader": ranks[0]} for _ in ranks]
        host.used = [f"10.0.0.{index + 1}"]
        host.folder = {"file_system": "nfs4", "mount": "/shared", "free": 10**12}
        host.disk = {"write": 1e9, "read": 2e9}
        host.loaders = [{"rate": 500.0, "images": 100, "classes": 10} for _ in ranks]
        if index:
            host.folder |= {"sees": True, "error": "", "lock_refused": True, "renamed_after": 0.1}
            host.clock = {"offset": 0.01, "error": 0.001}
            host.link = {"latency": 1e-4, "bandwidth": 1.2e9}
        else:
            host.folder |= {"seen": [2, 4], "missing": []}
        hosts.append(host)
    all_reduce = [
        {"bytes": 8, "seconds": 1e-4, "bus_bandwidth": 1e5},
        {"bytes": 2**20, "seconds": 1e-2, "bus_bandwidth": 1.7e8},
    ]
    return Cluster(hosts, "digits", "/shared/runs/digits", "gloo", 2.0**21, 6e6, joined=True, all_reduce=all_reduce)


@pytest.fixture
def found() -> Callable[..., list[tuple[str, str]]]:
    """Kind and text of the findings of some topics, in which a word stands."""

    def select(findings, *words: object) -> list[str]:
        return [one.kind for one in findings if all(str(word) in one.text for word in words)]

    return select
