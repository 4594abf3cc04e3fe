"""Roll calls and the neighbour group."""

import threading
import time

import pytest

from unite_fast.distributed.peers import name_ranks


def _roll_call(join, silent: int) -> list[int]:
    peers = join()
    if peers.rank == 0:
        missing = peers.missing_ranks()
    else:
        end = time.monotonic() + 3
        while time.monotonic() < end and (peers.rank == silent or not peers.answer_roll_call()):
            time.sleep(0.02)
        missing = []
    peers.votes.wait()
    return missing


@pytest.mark.parametrize(("silent", "missing"), [(1, [0, 1]), (2, [0, 2])])
def test_a_roll_call_finds_the_ranks_that_do_not_answer(ranks, join, silent, missing):
    """Rank 0 calls the roll here and does not answer it itself; in a run another thread answers."""
    assert ranks(3, _roll_call, join, silent) == [missing, [], []]


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


def test_names_of_ranks():
    assert [name_ranks(ranks) for ranks in ([], [1], [0, 2])] == ["another process", "rank 1", "ranks 0, 2"]
