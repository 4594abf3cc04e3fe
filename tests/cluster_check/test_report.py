"""What is printed, and the JSON file."""

import json

from unite_fast.cluster_check.findings import Finding
from unite_fast.cluster_check.records import Host
from unite_fast.cluster_check.report import as_json, lines, table


def test_the_table_has_a_row_for_each_host(cluster):
    cluster.hosts[2].folder["sees"] = False
    header, *rows = table(cluster)
    assert len(rows) == 3
    for row, name, address in zip(rows, ("node1", "node2", "node3"), ("10.0.0.1", "10.0.0.2", "10.0.0.3"), strict=True):
        assert row.split()[:4] == [name, address, "eth0", "cpu"]
        assert {"4096", "1000", "2000"} <= set(row.split())  # open files, images/s and MB/s
    assert "not shared" in rows[2] and "nfs4" in rows[1] and "nfs4" in rows[0]
    # Numbers end where their heading ends.
    end = header.index("link GB/s") + len("link GB/s")
    assert rows[1][:end].endswith(" 1.2") and rows[0][:end].endswith("-")


def test_columns_without_values_are_left_out(cluster):
    for host in cluster.hosts:
        host.link, host.clock = {}, {}
    header = table(cluster)[0]
    assert "link" not in header and "clock" not in header and "cores" in header


def test_a_host_of_which_nothing_is_known_has_a_row(cluster):
    cluster.hosts.append(Host("node4", [6]))
    row = table(cluster)[-1].split()
    assert row[0] == "node4" and set(row[1:]) == {"-", "1"}


def test_errors_come_before_warnings_and_are_counted(cluster):
    text = lines(cluster, [Finding("warning", "slow"), Finding("error", "broken"), Finding("error", "gone")])
    assert text[-4:-1] == ["error: broken", "error: gone", "warning: slow"]
    assert text[-1].startswith("failed") and "2 errors, 1 warning" in text[-1]
    assert lines(cluster, [Finding("warning", "slow")])[-1].startswith("ok")


def test_software_is_listed_once_if_it_is_the_same(cluster):
    cluster.hosts[1].facts["software"]["triton"] = "1"
    text = "\n".join(lines(cluster, []))
    assert "torch 2.13.0" in text and "triton" not in text and "kernel" not in text
    assert "1 MB" in text and "10.0 ms" in text and "20.0 ms" in text  # all-reduce, gradients


def test_json_has_all_facts(cluster):
    data = json.loads(json.dumps(as_json(cluster, [Finding("error", "broken")], 2)))
    assert (data["status"], data["errors"], data["warnings"], data["world"]) == (2, ["broken"], [], 6)
    assert [host["label"] for host in data["hosts"]] == ["node1", "node2", "node3"]
    assert data["hosts"][1]["link"] == {"latency": 1e-4, "bandwidth": 1.2e9}
    assert data["all_reduce"][0]["bytes"] == 8
