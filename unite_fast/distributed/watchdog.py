"""Ends a process that makes no progress or lost contact, with a line that says what it was doing."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed

from unite_fast.distributed.launch import under_torchrun
from unite_fast.distributed.peers import PATIENCE, ROLL_CALL, TEMPORARY, LostContact, Peers, name_ranks

HUNG = 124
"""Exit status of a process that made no progress, as of timeout(1)."""


class Watchdog:
    """Threads that end this process when it hangs: in a collective that another rank does not join, in a disk or data
    loader that does not answer, or on a device that waits for a dead rank. Works with every backend, whatever
    its own timeouts are.

    If torchrun itself was killed, the watchdog asks this process to stop with SIGTERM, since nothing else would.

    Use it as a context manager; outside, `beat` is only recorded.
    """

    def __init__(self, peers: Peers, timeout: float, step: int = 0):
        """
        Args:
            timeout: seconds without a beat after which the process ends.
        """
        self.peers, self.timeout = peers, timeout
        self.beat(step, "starting", patient=True)
        self.closed = threading.Event()
        self.parent = os.getppid() if under_torchrun() else None

    def beat(self, step: int, activity: str, patient: bool = False) -> None:
        """Report progress.

        Args:
            activity: what comes next, for the message if it never ends: "reading images".
            patient: allow `PATIENCE` times the timeout.
        """
        self.step, self.activity = step, activity
        self.limit = self.timeout * (PATIENCE if patient else 1)
        self.last_beat = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.main_thread = threading.get_ident()
        jobs = [self._watch_progress]
        if self.peers.world > 1:
            jobs += [self._watch_next_rank, self._watch_roll_call]
        self.threads = [threading.Thread(target=job, daemon=True) for job in jobs]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, kind, *_):
        self.closed.set()
        if kind is None:
            if self.peers.world > 1:
                self.peers.release_previous()
            for thread in self.threads:
                thread.join()

    def _watch_progress(self) -> None:
        pause, awake = min(1.0, self.timeout / 10), time.monotonic()
        while not self.closed.wait(pause):
            now = time.monotonic()
            if now - awake > pause + 1:
                # The process was stopped meanwhile, by Ctrl-Z or with its machine: that time does not count.
                self.last_beat += now - awake - pause
            awake = now
            if time.monotonic() - self.last_beat > self.limit:
                stack = "".join(traceback.format_stack(sys._current_frames()[self.main_thread]))
                missing = self.peers.missing_ranks() if self.peers.world > 1 else []
                answer = f"; no answer from {name_ranks(missing)}" if missing else ""
                self._exit(f"no progress for {self.limit:g} s while {self.activity}{answer}\n{stack}", HUNG)
            if self.parent and os.getppid() != self.parent:
                self.parent = None
                os.kill(os.getpid(), signal.SIGTERM)

    def _watch_next_rank(self) -> None:
        try:
            self.peers.wait_for_next()
        except RuntimeError:
            if not self.closed.is_set():
                self.peers.call_roll()

    def _watch_roll_call(self) -> None:
        while not self.peers.answer_roll_call():
            if self.closed.wait(ROLL_CALL / 6):
                return
        missing = self.peers.missing_ranks()
        # Time for the main thread to report the error itself (see `report_lost_contact`), or for `_watch_progress`.
        if not self.closed.wait(ROLL_CALL):
            self._exit(f"lost contact with {name_ranks(missing)} while {self.activity}", TEMPORARY)

    def _exit(self, message: str, status: int) -> None:
        if not self.closed.is_set():
            rank = f"rank {self.peers.rank}: " if self.peers.world > 1 else ""
            # One write, so that the lines of several processes do not mix.
            sys.stderr.write(f"error: {rank}step {self.step}: {message.rstrip()}\n")
            sys.stderr.flush()
            os._exit(status)


@contextmanager
def report_lost_contact(watchdog: Watchdog) -> Iterator[None]:
    """Turn PyTorch's error for a lost rank into one line that names the step and the rank.

    Raises:
        LostContact
    """
    try:
        yield
    except RuntimeError as error:
        if watchdog.peers.world == 1 or not is_communication_error(error):
            raise
        missing = name_ranks(watchdog.peers.missing_ranks())
        raise LostContact(f"step {watchdog.step}: lost contact with {missing} while {watchdog.activity}") from error


def is_communication_error(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank. Gloo raises bare RuntimeErrors, which name its files."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)
