"""Fixtures for tests on several ranks."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from torch import distributed

from unite_fast.distributed import peers, signals, watchdog
from unite_fast.distributed.environment import read_environment
from unite_fast.distributed.peers import Peers
from unite_fast.distributed.store import fresh_store


@pytest.fixture(autouse=True)
def short_roll_call(monkeypatch):
    monkeypatch.setattr(watchdog, "ROLL_CALL", 1.5)
    monkeypatch.setattr(peers, "ROLL_CALL", 1.5)


@pytest.fixture(autouse=True)
def vote_in_each_step(monkeypatch):
    monkeypatch.setattr(signals, "VOTE_SECONDS", 0.0)


@pytest.fixture
def second_machine(monkeypatch) -> None:
    """The environment of rank 1 of two, each on its own machine."""
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture(scope="session")
def join() -> Callable[[], Peers]:
    """Joins the process group of this rank; for functions that `ranks` runs."""

    def join_group(timeout: float = 30.0) -> Peers:
        store, environment = fresh_store(timeout), read_environment()
        rank, world, limit = environment.rank, environment.world, timedelta(seconds=timeout)
        peers = Peers(rank, world, store)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        peers.open_groups()
        return peers

    return join_group
