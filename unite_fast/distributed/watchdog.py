"""Ends a process that cannot make progress, with a line that says what it was doing."""

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
from unite_fast.distributed.peers import PATIENCE, ROLL_CALL, TEMPORARY, LostContact, Peers, named

HUNG = 124
"""Exit status of a process that made no progress: that of timeout(1)."""


class Watchdog:
    """Threads that end this process when it cannot go on: it makes no progress (a collective operation that another
    process does not join, a disk or a data loader that hangs), or another process died and this one does not notice
    (it waits for its device). Used as a context manager; outside, it only takes notes.

    It depends on no backend's timeouts, and says what the process was doing. It also asks a process to stop whose
    torchrun was killed: nobody would.
    """

    def __init__(self, peers: Peers, timeout: float, step: int = 0):
        """
        Args:
            timeout: seconds between two beats after which the process ends.
        """
        self.peers, self.timeout = peers, timeout
        self.beat(step, "starting", patient=True)
        self.ended = threading.Event()
        self.parent = os.getppid() if under_torchrun() else None

    def beat(self, step: int, doing: str, patient: bool = False) -> None:
        """A sign of life.

        Args:
            doing: what comes next, to be said if it never ends: "reading images".
            patient: it may take `PATIENCE` times as long.
        """
        self.step, self.doing = step, doing
        self.limit = self.timeout * (PATIENCE if patient else 1)
        self.last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.main = threading.get_ident()
        jobs = [self._watch_progress]
        if self.peers.world > 1:
            jobs += [self._watch_next, self._listen]
        self.threads = [threading.Thread(target=job, daemon=True) for job in jobs]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, kind, *_):
        self.ended.set()
        if kind is None:
            if self.peers.world > 1:
                self.peers.hang_up()
            for thread in self.threads:
                thread.join()

    def _watch_progress(self) -> None:
        while not self.ended.wait(min(1.0, self.timeout / 10)):
            if time.monotonic() - self.last > self.limit:
                stack = "".join(traceback.format_stack(sys._current_frames()[self.main]))
                silent = self.peers.silent() if self.peers.world > 1 else []
                answer = f"; no answer from {named(silent)}" if silent else ""
                self._end(f"no progress for {self.limit:g} s while {self.doing}{answer}\n{stack}", HUNG)
            if self.parent and os.getppid() != self.parent:
                self.parent = None
                os.kill(os.getpid(), signal.SIGTERM)

    def _watch_next(self) -> None:
        try:
            self.peers.wait_for_next()
        except RuntimeError:
            if not self.ended.is_set():
                self.peers.call_roll()

    def _listen(self) -> None:
        while not self.peers.called():
            if self.ended.wait(ROLL_CALL / 6):
                return
        silent = self.peers.silent()
        # The main thread may find out by itself (see `contact`), or the one that watches progress may.
        if not self.ended.wait(ROLL_CALL):
            self._end(f"lost contact with {named(silent)} while {self.doing}", TEMPORARY)

    def _end(self, what: str, status: int) -> None:
        if not self.ended.is_set():
            rank = f"rank {self.peers.rank}: " if self.peers.world > 1 else ""
            # In one piece, or it would mix with what other processes write.
            sys.stderr.write(f"error: {rank}step {self.step}: {what.rstrip()}\n")
            sys.stderr.flush()
            os._exit(status)


@contextmanager
def contact(watchdog: Watchdog) -> Iterator[None]:
    """What PyTorch raises inside when another process is gone becomes one line that names step and process.

    Raises:
        LostContact
    """
    try:
        yield
    except RuntimeError as error:
        if watchdog.peers.world == 1 or not broken(error):
            raise
        who = named(watchdog.peers.silent())
        raise LostContact(f"step {watchdog.step}: lost contact with {who} while {watchdog.doing}") from error


def broken(error: RuntimeError) -> bool:
    """Whether a collective operation failed for want of the other processes. Gloo raises bare RuntimeErrors, which name
    its source files."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)
