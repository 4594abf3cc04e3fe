"""Fixtures for tests on several ranks."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from torch import distributed

from unite_fast.distributed import peers, watchdog
from unite_fast.distributed.launch import fresh_store
from unite_fast.distributed.peers import Peers


@pytest.fixture(autouse=True)
def short_roll_call(monkeypatch):
    monkeypatch.setattr(watchdog, "ROLL_CALL", 1.5)
    monkeypatch.setattr(peers, "ROLL_CALL", 1.5)


@pytest.fixture(scope="session")
def join() -> Callable[[], Peers]:
    """Joins the process group of this rank; for functions that `ranks` runs."""

    def join_group(timeout: float = 30.0) -> Peers:
        store, rank, world = fresh_store(timeout)
        limit = timedelta(seconds=timeout)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        return Peers(rank, world)

    return join_group
