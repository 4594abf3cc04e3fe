"""Signals: all ranks stop after the same step, and a second signal has its usual effect."""

import itertools
import os
import signal
import time
from collections.abc import Callable

import pytest
from torch import distributed

from unite_fast.distributed import signals
from unite_fast.distributed.peers import Peers
from unite_fast.distributed.signals import SIGNALS, StopVote, exit_status, stop_on_signals


@pytest.fixture
def sigint():
    """Python's handler for Ctrl-C: a shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_are_recorded_and_a_second_one_has_its_usual_effect(sigint):
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with stop_on_signals(Peers()) as vote:
        assert vote.next_result() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert vote.next_result() == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert vote.received == [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    assert {number: signal.getsignal(number) for number in before} == before


def test_under_torchrun_the_same_signal_may_come_twice(monkeypatch):
    """Slurm sends it to the ranks and to torchrun, which forwards it."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    with stop_on_signals(Peers()) as vote:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert vote.next_result() == signal.SIGUSR1


def test_under_nohup_a_closed_terminal_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals(Peers()) as vote:
            os.kill(os.getpid(), signal.SIGHUP)
            assert vote.next_result() == 0
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def _steps_until_signal(join: Callable[[], Peers], number: int) -> tuple[int, int]:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    peers, step = join(), 0
    with stop_on_signals(peers) as vote:
        while step < 40 and not (by := vote.next_result()):
            step += 1
            # Ranks reach a step at different times, and one of them receives the signal.
            time.sleep(0.004 * peers.rank)
            if step == 7 and peers.rank == 2:
                os.kill(os.getpid(), number)
    return by, step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(ranks, join, number):
    assert ranks(3, _steps_until_signal, join, number) == [(number, 8)] * 3


def _steps_of_an_orphan(join: Callable[[], Peers]) -> tuple[int, int, int | None]:
    peers, step = join(), 0
    with stop_on_signals(peers) as vote:
        while step < 40 and not (by := vote.next_result()):
            step += 1
            if step == 7 and peers.rank == 1:
                peers.agent = 2**30  # has ended
                os.kill(os.getpid(), signal.SIGTERM)
    return by, step, vote.orphan


def test_all_learn_whose_torchrun_has_ended(ranks, join):
    assert ranks(3, _steps_of_an_orphan, join) == [(signal.SIGTERM, 8, 1)] * 3


def _intervals(join: Callable[[], Peers]) -> list[int]:
    """Steps at which a result arrives; rank 0 takes 20 ms a step."""
    peers, arrived = join(), []
    with stop_on_signals(peers) as vote:
        for step in range(1, 60):
            before = vote.pending
            assert vote.next_result() == 0
            if vote.pending is not before:
                arrived.append(step)
            if peers.rank == 0:
                time.sleep(0.02)
    return arrived


def test_votes_become_rare_when_steps_are_fast(ranks, join, monkeypatch):
    """At most one in a fifth of a second, here ten steps; all ranks vote at the same steps."""
    monkeypatch.setattr(signals, "VOTE_SECONDS", 0.2)
    first, *others = ranks(3, _intervals, join)
    assert others == [first, first]
    waits = [later - earlier for earlier, later in itertools.pairwise(first)]
    assert waits[0] == 1 and max(waits) in range(4, 11)
    assert all(after <= 2 * before for before, after in itertools.pairwise(waits))


def _save_together(join: Callable[[], Peers]) -> list[int]:
    """Rank 0 asks for a checkpoint before step 5."""
    peers, saved = join(), []
    with stop_on_signals(peers) as vote:
        for step in range(1, 12):
            if step == 5 and peers.rank == 0:
                vote.save_wanted = True
            assert vote.next_result() == 0
            if vote.save_now:
                saved.append(step)
    return saved


def test_a_checkpoint_that_rank_0_wants_is_saved_by_all_after_the_same_step(ranks, join):
    assert ranks(3, _save_together, join) == [[6]] * 3
    alone = StopVote(Peers())
    alone.save_wanted = True
    assert [alone.next_result() or alone.save_now for _ in range(3)] == [True, False, False]


def _steps_without_signal(join: Callable[[], Peers]) -> tuple[int, bool]:
    """One vote is always pending when a loop ends; no rank may leave before the others have its result."""
    peers, step = join(), 0
    with stop_on_signals(peers) as vote:
        while step < 5 and not vote.next_result():
            step += 1
            time.sleep(0.1 * peers.rank)
    distributed.destroy_process_group()
    return step, vote.pending is None


def test_a_loop_without_a_signal_ends_on_all_ranks(ranks, join):
    assert ranks(3, _steps_without_signal, join) == [(5, True)] * 3


def test_exit_statuses(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert [exit_status(0), exit_status(signal.SIGTERM)] == [0, 143]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    assert [exit_status(0), exit_status(signal.SIGTERM)] == [0, 0]
