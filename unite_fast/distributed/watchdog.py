"""Ends a process that makes no progress or lost contact, with a line that says what it was doing."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from torch import distributed

from unite_fast.distributed.agent import end_agent, end_agent_if_cut_off
from unite_fast.distributed.environment import read_environment
from unite_fast.distributed.hosts import name_ranks
from unite_fast.distributed.peers import HEARTBEAT, PATIENCE, ROLL_CALL, Peers, Trouble
from unite_fast.distributed.store import SILENCE, STORE_ERRORS, LostContact, MistakeElsewhere
from unite_fast.errors import CommonError, UserError

HUNG = 124
"""Exit status of a process that made no progress, as of timeout(1)."""


class Watchdog:
    """Threads that end this process when it hangs: in a collective that another rank does not join, in a disk or data
    loader that does not answer, or on a device that waits for a dead rank. Works with every backend, whatever
    its own timeouts are.

    Each rank sends heartbeats, so a machine that lost power or network is noticed in any phase. If torchrun itself was
    killed, the watchdog asks this process to stop with SIGTERM, since nothing else would.

    Use it as a context manager; outside, `beat` is only recorded.
    """

    def __init__(self, peers: Peers, timeout: float, record_mistake: Callable[[str], None] = lambda mistake: None):
        """
        Args:
            timeout: seconds without a beat after which the process ends.
            record_mistake: called before it ends because of a mistake of the user, its own or another rank's.
        """
        self.peers, self.timeout, self.record_mistake = peers, timeout, record_mistake
        self.beat(0, "starting", patient=True)
        self.closed = threading.Event()
        self.stop_asked = False
        """Whether this process was asked to stop because its torchrun has ended."""
        self.last_contact = time.monotonic()
        self.before_exit: Callable[[], None] = lambda: None
        """Called before this process ends because it hangs or lost contact."""

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
        self.threads: list[threading.Thread] = []
        self._start(self._watch_progress)
        if self.peers.world > 1:
            self._start(self._keep_contact)
        return self

    def watch_next_rank(self) -> None:
        """From now on, notice at once if the next rank dies. After `Peers.open_groups`."""
        self._start(self._wait_for_next_rank)

    def _start(self, job: Callable[[], None]) -> None:
        thread = threading.Thread(target=job, daemon=True)
        self.threads.append(thread)
        thread.start()

    def __exit__(self, kind, *_):
        self.closed.set()
        if kind is None:
            if self.peers.neighbours.group is not None:
                self.peers.release_previous()
            for thread in self.threads:
                thread.join()

    def end_all(self, error: UserError) -> None:
        """Tell all ranks that the run ends because of a mistake of the user, which a restart would repeat."""
        if self.peers.world > 1 and not isinstance(error, MistakeElsewhere):
            finder = "" if isinstance(error, CommonError) else f"{name_ranks([self.peers.rank])}: "
            self.peers.announce(Trouble(mistake=f"{finder}{error}"))
        self.record_mistake(str(error))

    def loss(self) -> UserError:
        """The error for a collective that failed: a rank is gone, perhaps because of a mistake that it announced."""
        with suppress(*STORE_ERRORS):
            trouble = self.peers.trouble()
            if trouble and trouble.mistake:
                return MistakeElsewhere(trouble.mistake)
        missing = name_ranks(self.peers.missing_ranks())
        return LostContact(f"step {self.step}: lost contact with {missing} while {self.activity}")

    def _watch_progress(self) -> None:
        pause, awake = min(1.0, self.timeout / 10), time.monotonic()
        while not self.closed.wait(pause):
            now = time.monotonic()
            if now - awake > pause + 1:
                # The process was stopped meanwhile, by Ctrl-Z or with its machine: that time does not count.
                self.last_beat += now - awake - pause
                self.last_contact = max(self.last_contact, now)
                self.peers.was_paused()
            awake = now
            if time.monotonic() - self.last_beat > self.limit:
                stack = "".join(traceback.format_stack(sys._current_frames()[self.main_thread]))
                missing = self.peers.missing_ranks() if self.peers.world > 1 else []
                answer = f"; no answer from {name_ranks(missing)}" if missing else ""
                self._exit(f"no progress for {self.limit:g} s while {self.activity}{answer}\n{stack}", HUNG)
            if self.peers.world > 1 and time.monotonic() - self.last_contact > SILENCE:
                self._exit_lost([0], f" for {SILENCE:g} s")
            if self.peers.orphaned and not self.stop_asked:
                self.stop_asked = True
                self._torchrun_ended()

    def _torchrun_ended(self) -> None:
        """Ask for a stop: nothing else would end this process. The stop vote tells the other ranks why."""
        os.kill(os.getpid(), signal.SIGTERM)

    def _keep_contact(self) -> None:
        """Send heartbeats, and look for trouble. Rank 0 looks for silent ranks too."""
        awake = time.monotonic()
        try:
            while not self.closed.wait(HEARTBEAT):
                if time.monotonic() - awake > HEARTBEAT + 1:
                    self.peers.was_paused()
                self.peers.beat()
                if self.peers.rank == 0 and (silent := self.peers.silent_ranks()):
                    self.peers.announce(Trouble(silent))
                if trouble := self.peers.trouble():
                    self.peers.answer_roll_call()
                    self._end_by(trouble)
                    return
                self.last_contact = awake = time.monotonic()
        except STORE_ERRORS:
            self._store_gone()

    def _end_by(self, trouble: Trouble) -> None:
        if trouble.mistake:
            # Time for the main thread of a rank that found the mistake too.
            if not self.closed.wait(HEARTBEAT):
                self.end_all(MistakeElsewhere(trouble.mistake))
                self._exit(trouble.mistake, UserError.status, quiet=read_environment().local_rank > 0)
            return
        missing = self.peers.missing_ranks()
        # Time for the main thread to report the error itself (see `report_lost_contact`), or for `_watch_progress`.
        if not self.closed.wait(ROLL_CALL):
            self._exit_lost(missing)

    def _store_gone(self) -> None:
        """The store ended with rank 0, or with torchrun. In that case `_watch_progress` asks for a stop, and the run
        goes on without heartbeats until then."""
        deadline = time.monotonic() + ROLL_CALL
        while time.monotonic() < deadline:
            if self.closed.wait(0.1):
                return
            if self.peers.orphaned or not self.peers.agent:
                self.last_contact = float("inf")
                return
        self._exit_lost([0])

    def _wait_for_next_rank(self) -> None:
        try:
            self.peers.wait_for_next()
        except RuntimeError:
            if not self.closed.is_set():
                self.peers.announce(Trouble())

    def _exit_lost(self, missing: list[int], how_long: str = "") -> None:
        self._exit(f"lost contact with {name_ranks(missing)}{how_long} while {self.activity}", LostContact.status)

    def _exit(self, message: str, status: int, quiet: bool = False) -> None:
        if not self.closed.is_set():
            rank = f"{name_ranks([self.peers.rank])}: " if self.peers.world > 1 else ""
            if quiet:
                time.sleep(1)  # the first rank of this machine prints it, and has time for it
            else:
                # One write, so that the lines of several processes do not mix.
                sys.stderr.write(f"error: {rank}step {self.step}: {message.rstrip()}\n")
                sys.stderr.flush()
            self.closed.set()  # this message is enough
            self.before_exit()
            if status == UserError.status:
                end_agent()
            else:
                end_agent_if_cut_off()
            os._exit(status)


@contextmanager
def report_lost_contact(watchdog: Watchdog) -> Iterator[None]:
    """Turn PyTorch's error for a lost rank into one line that names the step and the rank.

    Raises:
        LostContact: a rank is gone; `MistakeElsewhere` if it said why.
    """
    try:
        yield
    except RuntimeError as error:
        if watchdog.peers.world == 1 or not is_communication_error(error):
            raise
        raise watchdog.loss() from error


def is_communication_error(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank. Gloo raises bare RuntimeErrors, which name its files."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)
