"""Ranks that die, hang or freeze: they and the others end with a line that names them."""

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import distributed

from unite_fast.distributed import peers as peers_module
from unite_fast.distributed import watchdog as watchdog_module
from unite_fast.distributed.peers import Peers
from unite_fast.distributed.signals import stop_on_signals
from unite_fast.distributed.watchdog import HUNG, Watchdog, report_lost_contact
from unite_fast.errors import TemporaryError, UserError

TEMPORARY = TemporaryError.status


def in_child(function: Callable, *arguments: object) -> int:
    """Run the function in a forked process; returns its exit status, or minus the number of the signal that ended it.
    This process serves the store, as torchrun's agent does."""
    pid = os.fork()
    if pid == 0:
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        try:
            function(*arguments)
        except UserError as error:
            sys.stderr.write(f"error: rank {os.environ['RANK']}: {error}\n")  # one write, as in cli.py
            sys.stderr.flush()
            os._exit(error.status)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    if os.environ.get("RANK") == "0":
        # After the fork, which could otherwise inherit a lock that the store's thread holds.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(*address, is_master=True, wait_for_workers=False)  # noqa: F841
    status = os.waitpid(pid, os.WUNTRACED)[1]
    if os.WIFSTOPPED(status):
        time.sleep(2 * peers_module.ROLL_CALL + 1)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    if status and os.environ.get("RANK") == "0":
        time.sleep(2 * peers_module.ROLL_CALL)  # other ranks may still use the store
    return os.waitstatus_to_exitcode(status)


def train_until_failure(join: Callable[[], Peers], failure: Callable, timeout: float) -> None:
    """The steps of a run; in the fifth, rank 1 calls `failure`."""
    peers = join()
    with Watchdog(peers, timeout) as watchdog, report_lost_contact(watchdog), stop_on_signals(peers) as vote:
        watchdog.watch_next_rank()
        for step in range(1, 1000):
            watchdog.beat(step, "waiting for the other processes")
            vote.next_result()
            watchdog.beat(step, "reading images")
            if step == 5 and peers.rank == 1:
                failure()
            time.sleep(0.01)


def sleep() -> None:
    time.sleep(100)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise UserError("only here")


def bug() -> None:
    raise RuntimeError("a bug")


def errors(capfd: pytest.CaptureFixture) -> tuple[list[str], str]:
    """The error lines, and all of stderr."""
    printed = capfd.readouterr().err
    return sorted(line for line in printed.splitlines() if line.startswith("error: ")), printed


@pytest.mark.parametrize(("failure", "status"), [(kill, -signal.SIGKILL), (fail, 2), (bug, 1)])
def test_a_rank_that_dies_ends_the_others_which_name_it(ranks, join, capfd, failure, status):
    start = time.monotonic()
    assert ranks(3, in_child, train_until_failure, join, failure, 60.0) == [TEMPORARY, status, TEMPORARY]
    assert time.monotonic() - start < 20
    lines, printed = errors(capfd)
    lost = r"error: rank {}: step [567]: lost contact with rank 1 while waiting for the other processes"
    rank_1 = ["error: rank 1: only here"] * (failure is fail)
    assert len(lines) == 2 + len(rank_1)
    assert re.fullmatch(lost.format(0), lines[0])
    assert re.fullmatch(lost.format(2), lines[-1])
    assert lines[1:-1] == rank_1
    assert ("Traceback" in printed) == (failure is bug)


def _wait_for_the_device(join: Callable[[], Peers]) -> None:
    """A rank whose main thread waits for its device, because another rank died during an NCCL collective."""
    peers = join()
    with Watchdog(peers, 60.0) as watchdog:
        watchdog.watch_next_rank()
        watchdog.beat(5, "writing metrics")
        if peers.rank == 3:
            time.sleep(0.5)
            kill()
        time.sleep(100)


def test_a_rank_that_dies_ends_the_others_even_if_they_are_stuck(ranks, join, capfd, mentions):
    start = time.monotonic()
    assert ranks(4, in_child, _wait_for_the_device, join) == [TEMPORARY] * 3 + [-signal.SIGKILL]
    assert time.monotonic() - start < 15
    lines, _ = errors(capfd)
    for rank, line in zip(range(3), lines, strict=True):
        assert re.match(mentions(f"error: rank {rank}", "step 5", "rank 3", "metrics"), line)


def test_a_rank_that_hangs_ends_with_an_error_line_and_its_stack(ranks, join, capfd, mentions):
    """The other ranks hang as well, or lose contact with it, whichever comes first."""
    statuses = ranks(3, in_child, train_until_failure, join, sleep, 1.0)
    assert statuses[1] == HUNG and {statuses[0], statuses[2]} <= {HUNG, TEMPORARY}
    lines, printed = errors(capfd)
    assert re.match(mentions("error: rank 1", "step 5", "1 s", "images"), lines[1])
    for rank in (0, 2):
        assert re.match(rf"error: rank {rank}: step [567]: .*processes", lines[rank])
    assert "in sleep\n    time.sleep(100)\n" in printed


def test_a_rank_that_is_frozen_ends_the_others_which_name_it(ranks, join, capfd):
    """The frozen rank prints nothing; torchrun kills it when the others have ended."""
    assert ranks(3, in_child, train_until_failure, join, freeze, 1.0) == [HUNG, -signal.SIGKILL, HUNG]
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


def test_a_process_stops_when_its_torchrun_is_gone(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    read, write = os.pipe()

    def worker() -> None:
        peers = Peers()
        with Watchdog(peers, 60.0), stop_on_signals(peers) as vote:
            os.write(write, b"ready ")
            for _ in range(100):
                if by := vote.next_result():
                    os.write(write, f"{by} {vote.orphan}".encode())
                    os._exit(0)
                time.sleep(0.1)

    def agent() -> None:
        if os.fork() == 0:
            worker()
        assert os.read(read, 6) == b"ready "
        os._exit(0)

    assert in_child(agent) == 0
    assert os.read(read, 6) == b"15 0"


def test_a_process_whose_torchrun_ended_before_it_watched_stops(monkeypatch):
    monkeypatch.setattr(peers_module, "agent_process", lambda: 1)
    monkeypatch.setattr(peers_module, "is_orphan", lambda: True)
    peers = Peers()
    with stop_on_signals(peers) as vote, Watchdog(peers, 60.0):
        deadline = time.monotonic() + 20
        while not (by := vote.next_result()) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert (by, vote.orphan) == (signal.SIGTERM, 0)


def test_other_errors_are_raised_unchanged():
    with pytest.raises(RuntimeError, match="shape mismatch"), report_lost_contact(Watchdog(Peers(), 60.0)):
        raise RuntimeError("shape mismatch")


def test_time_in_which_the_process_was_stopped_does_not_count():
    """Ctrl-Z and fg, or a machine that was suspended."""
    pid = os.fork()
    if pid == 0:
        with Watchdog(Peers(), 1.0) as watchdog:
            watchdog.beat(1, "computing")
            time.sleep(0.3)
            freeze()
            time.sleep(0.3)
            watchdog.beat(2, "computing")
            time.sleep(0.3)
            os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    time.sleep(2)
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _lose_the_network(join: Callable[[], Peers]) -> None:
    """Requests of rank 1 to the store hang, as after a power cut or with a cut cable: no connection breaks."""
    peers = join()
    if peers.rank == 1:
        peers.beat = lambda: time.sleep(1000)
    with Watchdog(peers, 60.0) as watchdog:
        watchdog.beat(5, "saving a checkpoint", patient=True)
        time.sleep(100)


def test_a_machine_without_network_is_named_on_both_sides(ranks, join, capfd, monkeypatch):
    for module in (peers_module, watchdog_module):
        monkeypatch.setattr(module, "SILENCE", 4.0)
    assert ranks(3, in_child, _lose_the_network, join) == [TEMPORARY] * 3
    lines, _ = errors(capfd)
    for rank, lost in ((0, 1), (1, 0), (2, 1)):
        assert re.fullmatch(
            rf"error: rank {rank}: step 5: lost contact with rank {lost}\b.* saving a checkpoint", lines[rank]
        )


def _mistake_on_rank_1(join: Callable[[], Peers], noted: Path) -> None:
    peers = join()
    with Watchdog(peers, 60.0, lambda mistake: (noted / str(peers.rank)).write_text(mistake)) as watchdog:
        if peers.rank == 1:
            watchdog.end_all(UserError("a wrong key"))
            raise UserError("a wrong key")
        time.sleep(100)


def test_a_mistake_of_one_rank_ends_all_with_status_2(ranks, join, capfd, tmp_path):
    """The first rank of a machine prints it, and the rank itself."""
    assert ranks(3, in_child, _mistake_on_rank_1, join, tmp_path) == [2] * 3
    lines, _ = errors(capfd)
    assert len(lines) == 2 and all("rank 1: a wrong key" in line for line in lines)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "0": "rank 1: a wrong key",
        "1": "a wrong key",
        "2": "rank 1: a wrong key",
    }
