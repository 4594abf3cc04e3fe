"""Ranks that vanish before they have joined, and mistakes that are found before."""

import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from unite_fast.distributed import hosts, joining
from unite_fast.distributed.hosts import name_ranks
from unite_fast.distributed.joining import EarlyPeers
from unite_fast.distributed.peers import Peers, Trouble
from unite_fast.distributed.store import MISTAKE
from unite_fast.errors import TemporaryError


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


@pytest.fixture(autouse=True)
def forget_hosts():
    yield
    hosts.guess_hosts([])


def test_only_a_rank_that_has_sent_heartbeats_can_fall_silent(store, monkeypatch):
    monkeypatch.setattr(joining, "EARLY_SILENCE", 0.5)
    store.set("early/2", "7 node2")  # of an earlier start
    first, second = EarlyPeers(Peers(0, 3), store), EarlyPeers(Peers(1, 3), store)
    assert first.silent_ranks() == []
    second.beat()
    assert first.silent_ranks() == []
    time.sleep(0.6)
    second.beat()
    assert first.silent_ranks() == []
    time.sleep(0.6)
    assert first.silent_ranks() == [1]
    first.was_paused()
    assert first.silent_ranks() == []


def test_ranks_are_named_by_what_their_heartbeats_say(store):
    first, second = EarlyPeers(Peers(0, 3), store), EarlyPeers(Peers(1, 3), store)
    second.host = "node b"
    second.beat()
    first.silent_ranks()
    assert name_ranks([0, 1]) == f"rank 0 on {first.host} and rank 1 on node b"
    first.host = "node a"
    first.beat()
    second.known.clear()
    second.beat()
    assert name_ranks([0, 1]) == "rank 0 on node a and rank 1 on node b"


def test_a_mistake_that_was_announced_is_trouble_and_seen(store, second_machine):
    peers = EarlyPeers(Peers(1, 2), store)
    assert peers.trouble() is None
    store.set(MISTAKE, "rank 0 on node1: no such key")
    assert peers.trouble() == Trouble(mistake="rank 0 on node1: no such key")
    peers.answer_roll_call()
    assert store.check([f"{MISTAKE}/seen/1"])


def test_a_mistake_leaves_the_main_thread_time_to_come_to_know_of_it(store, second_machine, monkeypatch):
    monkeypatch.setattr(joining, "MISTAKE_SECONDS", 2.5)
    watchdog = joining.Joining()
    watchdog.peers = peers = EarlyPeers(Peers(1, 2), store)
    ended = []
    monkeypatch.setattr(watchdog, "_exit", lambda message, status, **_: ended.append((message, status)))
    before, begun = peers.beats, time.monotonic()
    watchdog._end_by(Trouble(mistake="no such key"))
    assert ended == [("no such key", 2)]
    assert time.monotonic() - begun > 2.5 and peers.beats >= before + 2


PROGRAM = """
import os, sys, time
from unite_fast.distributed import joining, peers, store, watchdog
for module in (joining, store, watchdog):
    module.SILENCE = joining.EARLY_SILENCE = 5.0
joining.begin()
print("there", flush=True)
if sys.argv[1] == "end":
    time.sleep(4)
    joining.end()
    time.sleep(10 * (os.environ["RANK"] == "0"))
else:
    time.sleep(100)
"""


@pytest.fixture
def start(tmp_path, free_port):
    """Starts two processes that are joining, as if on two machines."""
    started = []

    def start(*words: str) -> list[subprocess.Popen]:
        for rank in range(2):
            variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
            variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port}
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, *words],
                    env=os.environ | {name: str(value) for name, value in variables.items()},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    cwd=tmp_path,  # where no other unite_fast is
                )
            )
        for process in started:
            assert process.stdout and process.stdout.readline() == "there\n"
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_machine_that_vanishes_while_joining_is_named(start, frozen):
    processes = start("join")
    time.sleep(4)
    begun = time.monotonic()
    processes[frozen].send_signal(signal.SIGSTOP)
    _, printed = processes[1 - frozen].communicate(timeout=60)
    assert processes[1 - frozen].returncode == TemporaryError.status
    assert 4 < time.monotonic() - begun < 30
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(rf"error: rank {1 - frozen}: step 0: lost contact with rank {frozen}\b.* while starting", line)


def test_processes_that_have_joined_may_end(start):
    for process in start("end"):
        _, printed = process.communicate(timeout=60)
        assert process.returncode == 0 and "error" not in printed
