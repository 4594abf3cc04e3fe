"""Each fault of a cluster is found, with its kind, host and values; a cluster without faults gives nothing."""

import pytest

from unite_fast.cluster_check import findings
from unite_fast.cluster_check.coordinator import Outcome
from unite_fast.cluster_check.findings import all_findings, descriptors_needed, part_findings


def test_a_healthy_cluster_has_no_findings(cluster):
    assert all_findings(cluster) == []


def test_differences_name_key_values_and_hosts(cluster, found):
    cluster.hosts[2].facts["software"] |= {"torch": "2.12.1", "triton": "3.8.0"}
    cluster.hosts[2].facts["environment"]["NCCL_ALGO"] = "Tree"
    result = all_findings(cluster)
    assert found(result, "torch", "2.13.0 on node1, node2", "2.12.1 on node3") == ["error"]
    assert found(result, "triton", "3.9.0", "3.8.0", "node3") == ["warning"]
    assert found(result, "NCCL_ALGO", "Tree on node3") == ["warning"]
    assert len(result) == 3


def test_devices(cluster, found):
    _, second, third = cluster.hosts
    second.devices[0]["device"] = "cuda"
    second.facts["gpus"] = ["H100"]
    third.devices[1]["device_error"] = "train.device is cuda"
    third.ranks = [4]
    third.facts |= {"cores": 4, "memory": 10**10, "cpu": "another"}
    result = all_findings(cluster)
    assert found(result, "the device", "cpu on node1, node3", "cuda on node2") == ["error"]
    assert found(result, "node2", "2 processes", "1 CUDA") == ["error"]
    assert found(result, "node3", "train.device is cuda") == ["error"]
    for words in (
        ("GPU", "1 x H100 on node2"),
        ("processes", "1 on node3"),
        ("cores", "4 on node3"),
        ("processor", "another on node3"),
        ("node3", "10 GB", "64"),
    ):
        assert found(result, *words) == ["warning"]


def test_open_files(cluster, found):
    assert descriptors_needed(6) == 2 * 5 + 256
    cluster.hosts[1].facts["descriptors"] = {"soft": 100, "hard": 266}
    cluster.hosts[2].facts["descriptors"] = {"soft": 100, "hard": 265}
    (result,) = findings.limits(cluster)
    assert found([result], "node3", 265, 266) == ["error"]
    cluster.hosts[2].facts["descriptors"] = {"soft": -1, "hard": -1}  # RLIM_INFINITY
    assert findings.limits(cluster) == []


def test_threads_and_memory_limits(cluster, found):
    first, second, third = (host.facts for host in cluster.hosts)
    first["environment"]["OMP_NUM_THREADS"] = "5"
    del second["environment"]["OMP_NUM_THREADS"]
    third |= {"infiniband": {"mlx5_0": "ACTIVE, 400 Gb/sec"}, "locked_memory": 65536}
    cluster.hosts[2].devices[0]["device"] = "cuda"
    third["shared_memory"]["size"] = 2**26
    result = findings.limits(cluster)
    assert found(result, "node1", "OMP_NUM_THREADS", 10, "8 cores", "set it to 4") == ["warning"]
    assert found(result, "node2", "OMP_NUM_THREADS", "8 cores") == ["warning"]
    assert found(result, "node3", "/dev/shm", "64 MB") == ["warning"]
    assert found(result, "node3", 65536, "ulimit -l") == ["warning"]


@pytest.mark.parametrize(("joined", "kind"), [(True, "warning"), (False, "error")])
def test_a_name_that_is_the_hosts_alone(cluster, found, joined, kind):
    """Debian's default, 127.0.1.1 for the own name, is only an error if the processes could not join."""
    cluster.joined = joined
    cluster.hosts[1].facts["own_addresses"] = ["127.0.1.1"]
    cluster.hosts[2].facts["own_addresses"] = []
    result = findings.names(cluster)
    assert found(result, "node2", "127.0.1.1", "GLOO_SOCKET_IFNAME") == [kind]
    assert found(result, "node3", "GLOO_SOCKET_IFNAME") == [kind]
    for host in cluster.hosts:
        host.facts["environment"]["GLOO_SOCKET_IFNAME"] = "eth0"
    assert findings.names(cluster) == []


def test_names(cluster, found):
    cluster.hosts[2].facts["name"] = "node1"
    cluster.hosts[1].facts["master"] = {"name": "node1", "addresses": ["10.9.9.9"]}
    result = findings.names(cluster)
    assert found(result, "2 hosts", "node1") == ["warning"]
    assert found(result, "node2", "MASTER_ADDR", "10.9.9.9", "10.0.0.1 on node1") == ["warning"]
    # The head may know its own name by a loopback address.
    cluster.hosts[0].facts["master"]["addresses"] = ["127.0.1.1"]
    assert found(findings.names(cluster), "MASTER_ADDR") == []


@pytest.mark.parametrize(
    ("variable", "value", "fits"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", False),
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "=eth0:1", True),
        ("NCCL_SOCKET_IFNAME", "ib,bond", False),
        ("NCCL_SOCKET_IFNAME", "^lo,docker", True),
        ("NCCL_SOCKET_IFNAME", "^lo,eth", False),
    ],
)
def test_named_interfaces(cluster, found, variable, value, fits):
    cluster.hosts[1].facts["environment"][variable] = value
    assert found(findings.interfaces(cluster), "node2", variable, value, "eth0") == ([] if fits else ["error"])


def test_interfaces_in_use(cluster, found):
    cluster.hosts[1].used = ["127.0.0.1"]
    cluster.hosts[2].facts["infiniband"] = {"mlx5_0": "ACTIVE, 400 Gb/sec", "mlx5_1": "DOWN, 10 Gb/sec"}
    result = findings.interfaces(cluster)
    assert found(result, "node2", "127.0.0.1") == ["warning"]
    assert found(result, "node3", "mlx5_1") == ["warning"] and found(result, "mlx5_0") == []


def test_clocks(cluster, found):
    cluster.hosts[1].clock = {"offset": -61.5, "error": 0.1}
    cluster.hosts[2].clock = {"offset": 1.5, "error": 0.6}  # may be within a second
    result = findings.clocks(cluster)
    assert found(result, "node2", "-61.5") == ["warning"] and len(result) == 1


def test_a_folder_that_is_not_shared(cluster, found):
    cluster.hosts[1].folder = {"sees": False, "file_system": "tmpfs", "mount": "/shared", "free": 1}
    result = findings.shared_folder(cluster)
    assert (
        found(result, "node2", "/shared/runs/digits", "tmpfs", "node1", "train.out") == ["error"] and len(result) == 1
    )


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"error": "Permission denied"}, "error", ("Permission denied",)),
        ({"lock_refused": False}, "error", ("lock", "nolock")),
        ({"renamed_after": None}, "warning", ("replaced", "actimeo")),
    ],
)
def test_a_folder_with_faults(cluster, found, change, kind, words):
    cluster.hosts[2].folder |= change
    result = findings.shared_folder(cluster)
    assert found(result, "node3", *words) == [kind] and len(result) == 1


def test_files_that_only_one_side_sees(cluster, found):
    cluster.hosts[0].folder["missing"] = [4]
    assert found(findings.shared_folder(cluster), "node3") == ["error"]


def test_a_slow_link_is_named(cluster, found):
    cluster.hosts[1].link = {"latency": 0.05, "bandwidth": 5e6}
    result = findings.network(cluster)
    assert found(result, "node2", "node1", "50.0 ms", "0.005 GB/s") == ["warning"] and len(result) == 1
    # Twice the largest size that was timed: twice its time.
    assert "20.0 ms" in result[0].text


def test_a_link_much_slower_than_the_others_is_named(cluster, found):
    cluster.hosts.append(cluster.hosts[1])
    cluster.hosts[2].link["bandwidth"] = 0.3e9
    assert found(findings.network(cluster), "node3", "0.30 GB/s", "1.20") == ["warning"]


def test_links_that_were_not_measured(cluster, found):
    cluster.hosts[2].link = {}
    assert found(findings.network(cluster), "node3") == ["warning"]
    cluster.all_reduce = []  # then the whole part failed, and that is told
    assert findings.network(cluster) == []


def test_time_of_the_gradients(cluster):
    cluster.gradient_bytes = (8 + 2**20) / 2
    assert cluster.gradient_seconds == pytest.approx((1e-4 + 1e-2) / 2)
    cluster.all_reduce = []
    assert cluster.gradient_seconds == 0


def test_rates(cluster, found):
    cluster.state_bytes = 6e11
    cluster.hosts[1].loaders = [{"rate": 100.0, "images": 99, "classes": 10}] * 2
    for host in cluster.hosts:
        host.disk["write"] = 1e9
    result = findings.rates(cluster)
    assert found(result, "600.0 GB", "200.0 s") == ["warning"]
    assert found(result, "node1", "1000.0 GB", "1800.0") == ["error"]
    assert found(result, "images", "100 on node1, node3", "99 on node2") == ["error"]
    assert found(result, "node2", "200 images/s", "1000") == ["warning"]


def test_parts_that_failed(found):
    outcomes = {
        "node1": Outcome({}),
        "node2": Outcome(error="refused"),
        "node3": Outcome(error="refused"),
        "node4": Outcome(error="not finished", late=True),
    }
    result = part_findings("loader", outcomes, only_warn=True)
    assert found(result, "node2, node3", "loader", "refused") == ["error"]
    assert found(result, "node4", "not finished") == ["warning"]
    assert found(part_findings("disk", outcomes, only_warn=False), "node4", "not finished") == ["error"]
    skipped = {f"node{index}": Outcome(error="skipped: join", skipped=True) for index in range(9)}
    result = part_findings("network", skipped, only_warn=False)
    assert found(result, "network", "join") == ["warning"] and len(result) == 1
