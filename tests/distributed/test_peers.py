"""Roll calls and the neighbour group."""

import threading
import time

import pytest

from unite_fast.distributed import peers as peers_module
from unite_fast.distributed.peers import Trouble


def _roll_call(join, silent: int) -> list[int]:
    peers = join()
    if peers.rank == 0:
        missing = peers.missing_ranks()
    else:
        end = time.monotonic() + 3
        while time.monotonic() < end and (peers.rank == silent or not peers.trouble()):
            time.sleep(0.02)
        if peers.rank != silent:
            peers.answer_roll_call()
        missing = []
    peers.votes.wait()
    return missing


@pytest.mark.parametrize(("silent", "missing"), [(1, [0, 1]), (2, [0, 2])])
def test_a_roll_call_finds_the_ranks_that_do_not_answer(ranks, join, silent, missing):
    """Rank 0 calls the roll here and does not answer it itself; in a run another thread answers."""
    assert ranks(3, _roll_call, join, silent) == [missing, [], []]


def _announce(join) -> list[object]:
    """Ranks 1 and 2 announce something, rank 1 first."""
    peers = join()
    before = peers.trouble()
    peers.votes.wait()
    if peers.rank == 1:
        peers.announce(Trouble([7]))
    peers.votes.wait()
    if peers.rank == 2:
        peers.announce(Trouble(mistake="a wrong key"))
    peers.votes.wait()
    found = [before, vars(peers.trouble()), peers.missing_ranks()]
    peers.votes.wait()
    return found


def test_the_first_announcement_counts_on_all_ranks(ranks, join):
    assert ranks(3, _announce, join) == [[None, {"lost": [7], "mistake": ""}, [7]]] * 3


def _silent(join) -> list[list[int]]:
    """Rank 2 stops to send heartbeats after the first."""
    peers, found = join(), []
    peers.votes.wait()
    if peers.rank == 0:
        found.append(peers.silent_ranks())
    for _ in range(10):
        if peers.rank != 2:
            peers.beat()
        peers.votes.wait()
        if peers.rank == 0:
            time.sleep(0.1)
            found.append(peers.silent_ranks())
    if peers.rank == 0:
        peers.was_paused()
        found.append(peers.silent_ranks())
    peers.votes.wait()
    return [found[0], found[1], found[-2], found[-1]] if found else []


def test_a_rank_without_heartbeats_is_silent_after_a_while(ranks, join, monkeypatch):
    monkeypatch.setattr(peers_module, "SILENCE", 0.5)
    assert ranks(3, _silent, join) == [[[], [], [2], []], [], []]


def _neighbours(join) -> bool:
    peers = join()
    thread = threading.Thread(target=peers.wait_for_next, daemon=True)
    thread.start()
    thread.join(0.3)
    waiting = thread.is_alive()
    peers.votes.wait()
    peers.release_previous()
    thread.join(30)
    return waiting and not thread.is_alive()


def test_each_rank_waits_for_the_next_one(ranks, join):
    assert ranks(3, _neighbours, join) == [True] * 3
