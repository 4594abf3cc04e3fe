"""Ranks that were started in another way are refused, and named with keys and values."""

import os
import re
import time

import pytest

from unite_fast.distributed.hosts import use_hosts
from unite_fast.distributed.process_group import Ranks
from unite_fast.distributed.start_check import check_same_start, differences
from unite_fast.distributed.store import fresh_store
from unite_fast.errors import UserError


def _start(values: dict) -> str:
    ranks, store = Ranks.from_environment(), fresh_store(30.0)
    message = ""
    try:
        check_same_start(values.get(ranks.rank, {"lr": 1.0, "steps": 5}), store, ranks, 30.0)
    except UserError as error:
        message = str(error)
    if ranks.main:
        time.sleep(0.5)  # it holds the store
    return message


def test_equal_starts_pass(ranks):
    assert ranks(3, _start, {}) == [""] * 3


def test_each_difference_is_named_on_all_ranks(ranks, mentions):
    other = {"lr": 2.0, "steps": 5}
    for message in ranks(3, _start, {2: other}):
        assert re.search(mentions("lr", "2.0", "rank 2", "1.0", "rank 0"), message)
        assert "steps" not in message


def test_a_missing_key_is_a_difference(ranks, mentions):
    for message in ranks(2, _start, {1: {"lr": 1.0}}):
        assert re.search(mentions("steps", "None", "rank 1", "5", "rank 0"), message)


@pytest.fixture
def two_machines():
    use_hosts(["node1"] * 2 + ["node2"] * 2)
    yield
    use_hosts([])


def test_ranks_with_the_same_difference_are_named_together(two_machines):
    line = differences({"seed": 0, "x": "a"}, {2: {"seed": 1, "x": "a"}, 3: {"seed": 1, "x": "a"}})
    assert line.startswith("seed is 1 on ranks 2, 3 on node2, 0 on rank 0 on node1")


def test_many_differences_are_counted(two_machines):
    first = {f"key{number}": 0 for number in range(9)}
    line = differences(first, {1: dict.fromkeys(first, 1)})
    assert all(f"key{number} is" in line for number in range(3)) and "key3" not in line and "6 more" in line
    assert os.linesep not in line
