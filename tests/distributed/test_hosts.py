"""Names of ranks in messages."""

import pytest

from unite_fast.distributed.hosts import known_hosts, name_ranks, use_hosts


@pytest.fixture(autouse=True)
def no_hosts_afterwards():
    yield
    use_hosts([])


def test_ranks_of_one_machine_have_numbers_only():
    for hosts in ([], ["node1"] * 4):
        use_hosts(hosts)
        assert known_hosts() == hosts
        names = [name_ranks(ranks) for ranks in ([], [1], [2, 0], [1, 2, 3], [0, 1, 3])]
        assert names == ["another process", "rank 1", "ranks 0, 2", "ranks 1 to 3", "ranks 0, 1, 3"]


def test_ranks_of_several_machines_are_named_with_them():
    use_hosts(["node1"] * 4 + ["node2"] * 4)
    assert name_ranks([5]) == "rank 5 on node2"
    assert name_ranks(range(4, 8)) == "ranks 4 to 7 on node2"
    assert name_ranks([0, 4, 6]) == "rank 0 on node1 and ranks 4, 6 on node2"
    assert name_ranks([9]) == "rank 9 on an unknown machine"
