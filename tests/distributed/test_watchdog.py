"""Signals that all processes heed together, processes that die or hang, starts after a start that failed."""

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed

from unite_fast.distributed import peers as peers_module
from unite_fast.distributed import signals, watchdog
from unite_fast.distributed.launch import fresh_store, launch_name
from unite_fast.distributed.peers import TEMPORARY, LostContact, Peers
from unite_fast.distributed.signals import exit_status, stop_on_signals
from unite_fast.distributed.watchdog import HUNG, Watchdog, contact
from unite_fast.errors import UserError
from unite_fast.training.run_folder import read_status, restarted, running, write_status


@pytest.fixture(autouse=True)
def short_roll_call(monkeypatch):
    monkeypatch.setattr(watchdog, "ROLL_CALL", 1.5)
    monkeypatch.setattr(peers_module, "ROLL_CALL", 1.5)


def join(timeout: float = 30.0) -> Peers:
    store, rank, world = fresh_store(timeout)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    return Peers(rank, world)


@pytest.fixture
def sigint():
    """Ctrl-C as Python has it: a shell starts what runs in its background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_are_remembered_and_a_second_one_acts_as_ever(sigint):
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    with stop_on_signals(Peers()) as stop:
        assert stop.agreed() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.received == [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    assert {number: signal.getsignal(number) for number in before} == before


def test_under_torchrun_the_same_signal_may_come_twice(monkeypatch):
    """From Slurm, and from torchrun to which Slurm sent it as well."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    with stop_on_signals(Peers()) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agreed() == signal.SIGUSR1


def _signalled(number: int) -> tuple[int, int]:
    peers, step = join(), 0
    with stop_on_signals(peers) as stop:
        while step < 40 and not (by := stop.agreed()):
            step += 1
            # Ranks reach a step at different times, and the signal comes to one of them.
            time.sleep(0.004 * peers.rank)
            if step == 7 and peers.rank == 2:
                os.kill(os.getpid(), number)
    return by, step


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(ranks, number):
    assert ranks(3, _signalled, number) == [(number, 8)] * 3


def _unsignalled() -> tuple[int, bool]:
    """One vote is always under way when a loop ends; nobody may leave before the others have it."""
    peers, step = join(), 0
    with stop_on_signals(peers) as stop:
        while step < 5 and not stop.agreed():
            step += 1
            time.sleep(0.1 * peers.rank)
    distributed.destroy_process_group()
    return step, stop.vote is None


def test_a_loop_that_nobody_stops_ends_on_all_ranks(ranks):
    assert ranks(3, _unsignalled) == [(5, True)] * 3


def _stale(first: bool) -> list[int]:
    """What torchrun's restart does: the same store as in a start that got as far as exchanging addresses, or less."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Keeps the server of the store up, as torchrun's agent does.
    server = next(distributed.rendezvous("env://", timeout=timedelta(seconds=30)))[0]
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    if first:
        # Of the start before, rank 1 came, confirmed and gave its address; rank 2 was killed before it came.
        server.set(f"start/{rank}", f"dead{rank}")
        server.set("start/proposal", "dead0,dead1")
        server.set("start/confirmed/1", "dead0,dead1")
        server.set("start/held", "dead0,dead1")
        server.set("start dead0/addresses", "gone")
    time.sleep(0.3 * (world - rank))  # the last one first
    peers = join()
    sums = torch.tensor([rank])
    distributed.all_reduce(sums)
    distributed.barrier()
    return [int(sums), peers.largest(rank).result()]


@pytest.mark.parametrize("first", [False, True])
def test_processes_find_each_other_in_a_store_that_holds_a_dead_start(ranks, first):
    assert ranks(3, _stale, first) == [[3, 2]] * 3


def _alone_of_two() -> str:
    os.environ["WORLD_SIZE"] = "2"
    with pytest.raises(LostContact) as lost:
        fresh_store(1.0)
    return str(lost.value)


def test_a_process_that_never_comes(ranks):
    assert ranks(1, _alone_of_two) == ["not all 2 processes came to the start within 1 s"]


def in_child(function: Callable, *arguments: object) -> int:
    """How a forked process that runs the function ends: its exit status, or minus the signal. This process keeps the
    store, as torchrun's agent does."""
    if os.environ.get("RANK") == "0":
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(*address, is_master=True, wait_for_workers=False)  # noqa: F841
    pid = os.fork()
    if pid == 0:
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        try:
            function(*arguments)
        except UserError as error:
            sys.stderr.write(f"error: rank {os.environ['RANK']}: {error}\n")  # in one piece, as cli.py does
            sys.stderr.flush()
            os._exit(error.status)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    status = os.waitpid(pid, os.WUNTRACED)[1]
    if os.WIFSTOPPED(status):
        time.sleep(2 * peers_module.ROLL_CALL + 1)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    if status and os.environ.get("RANK") == "0":
        time.sleep(2 * peers_module.ROLL_CALL)  # the others may still ask the store
    return os.waitstatus_to_exitcode(status)


def a_loop(accident: Callable, timeout: float) -> None:
    """Steps as of a run; in the fifth, rank 1 meets with an accident."""
    peers = join()
    with Watchdog(peers, timeout) as watchdog, contact(watchdog), stop_on_signals(peers) as stop:
        for step in range(1, 1000):
            watchdog.beat(step, "waiting for the other processes")
            stop.agreed()
            watchdog.beat(step, "reading images")
            if step == 5 and peers.rank == 1:
                accident()
            time.sleep(0.01)


def sleep() -> None:
    time.sleep(100)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise UserError("only here")


def mistake() -> None:
    raise RuntimeError("a mistake of ours")


def errors(capfd: pytest.CaptureFixture) -> tuple[list[str], str]:
    """The lines that name an error, and all that was printed."""
    printed = capfd.readouterr().err
    return sorted(line for line in printed.splitlines() if line.startswith("error: ")), printed


@pytest.mark.parametrize(("accident", "status"), [(kill, -signal.SIGKILL), (fail, 2), (mistake, 1)])
def test_a_rank_that_dies_ends_the_others_which_name_it(ranks, capfd, accident, status):
    begun = time.monotonic()
    assert ranks(3, in_child, a_loop, accident, 60.0) == [TEMPORARY, status, TEMPORARY]
    assert time.monotonic() - begun < 20
    lines, printed = errors(capfd)
    lost = r"error: rank {}: step [567]: lost contact with rank 1 while waiting for the other processes"
    own = ["error: rank 1: only here"] * (accident is fail)
    assert len(lines) == 2 + len(own)
    assert re.fullmatch(lost.format(0), lines[0])
    assert re.fullmatch(lost.format(2), lines[-1])
    assert lines[1:-1] == own
    assert ("Traceback" in printed) == (accident is mistake)


def _waits_for_the_device() -> None:
    """What a rank of several nodes does when another dies in the middle of NCCL's work: its main thread is stuck."""
    peers = join()
    with Watchdog(peers, 60.0) as watchdog:
        watchdog.beat(5, "writing metrics")
        if peers.rank == 3:
            time.sleep(0.5)
            kill()
        time.sleep(100)


def test_a_rank_that_dies_ends_the_others_even_if_they_are_stuck(ranks, capfd, mentions):
    begun = time.monotonic()
    assert ranks(4, in_child, _waits_for_the_device) == [TEMPORARY] * 3 + [-signal.SIGKILL]
    assert time.monotonic() - begun < 15
    lines, _ = errors(capfd)
    for rank, line in zip(range(3), lines, strict=True):
        assert re.match(mentions(f"error: rank {rank}", "step 5", "rank 3", "metrics"), line)


def test_a_rank_that_hangs_ends_with_its_line_and_where(ranks, capfd, mentions):
    """The others end by themselves, too, or because it has ended, whichever is first."""
    ended = ranks(3, in_child, a_loop, sleep, 1.0)
    assert ended[1] == HUNG and {ended[0], ended[2]} <= {HUNG, TEMPORARY}
    lines, printed = errors(capfd)
    assert re.match(mentions("error: rank 1", "step 5", "1 s", "images"), lines[1])
    for rank in (0, 2):
        assert re.match(rf"error: rank {rank}: step [567]: .*processes", lines[rank])
    assert "in sleep\n    time.sleep(100)\n" in printed


def test_a_rank_that_is_frozen_ends_the_others_which_name_it(ranks, capfd):
    """It cannot say anything itself; torchrun kills it when the others have ended."""
    assert ranks(3, in_child, a_loop, freeze, 1.0) == [HUNG, -signal.SIGKILL, HUNG]
    lines, _ = errors(capfd)
    assert len(lines) == 2
    for line, rank in zip(lines, (0, 2), strict=True):
        assert re.match(rf"error: rank {rank}: step [567]: .*\b1 s\b.*\brank 1\b", line)


def test_a_patient_beat_may_take_ten_times_as_long(ranks):
    def slowly(patient: bool) -> None:
        with Watchdog(Peers(), 0.2) as watchdog:
            for step in range(3):
                watchdog.beat(step, "saving", patient)
                time.sleep(0.5)
            watchdog.beat(3, "reading images")
        os._exit(0)

    assert in_child(slowly, True) == 0
    assert in_child(slowly, False) == HUNG


def test_a_process_whose_torchrun_is_gone_stops(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    read, write = os.pipe()

    def worker() -> None:
        with Watchdog(Peers(), 60.0), stop_on_signals(Peers()) as stop:
            os.write(write, b"ready ")
            for _ in range(100):
                if by := stop.agreed():
                    os.write(write, str(by).encode())
                    os._exit(0)
                time.sleep(0.1)

    def agent() -> None:
        if os.fork() == 0:
            worker()
        assert os.read(read, 6) == b"ready "
        os._exit(0)

    assert in_child(agent) == 0
    assert os.read(read, 6) == b"15"


def test_what_is_no_loss_of_contact_passes_through():
    with pytest.raises(RuntimeError, match="shape mismatch"), contact(Watchdog(Peers(), 60.0)):
        raise RuntimeError("shape mismatch")


def test_exit_statuses(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert [exit_status(0), exit_status(signal.SIGTERM)] == [0, 143]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    assert [exit_status(0), exit_status(signal.SIGTERM)] == [0, 0]


def _restarted(folder: Path, count_on_rank_1: int, run: str) -> bool:
    peers = join()
    os.environ["TORCHELASTIC_RUN_ID"] = run
    if peers.rank == 1:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(count_on_rank_1)
    return restarted(folder, peers)


def test_a_restart_by_torchrun_is_known_on_all_ranks(ranks, tmp_path, monkeypatch):
    """Each machine's torchrun counts for itself, and one that joins later counts from 0."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    write_status(tmp_path, running())
    assert read_status(tmp_path) == "running under torchrun job 7"
    assert ranks(2, _restarted, tmp_path, 1, "job 7") == [True, True]
    assert ranks(2, _restarted, tmp_path, 0, "job 7") == [False, False]
    # It never came to run: the folder is another run's, and --resume is still needed.
    assert ranks(2, _restarted, tmp_path, 1, "job 8") == [False, False]
    assert ranks(2, _restarted, tmp_path / "none", 1, "job 7") == [False, False]


def test_a_launch_without_a_name_of_its_own_is_told_from_others(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launch_name().endswith(f"-{os.getppid()}")
