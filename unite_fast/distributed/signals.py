"""Signals that ask a run to save and stop: all ranks stop after the same step."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from unite_fast.distributed.agent import under_torchrun
from unite_fast.distributed.hosts import name_ranks
from unite_fast.distributed.peers import Peers
from unite_fast.distributed.process_group import PendingMax
from unite_fast.errors import TemporaryError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Slurm can send SIGUSR1 some time before a job's limit, and a terminal that closes sends SIGHUP."""
VOTE_SECONDS = 1.0
"""Between two votes."""
MOST_STEPS = 100
"""Between two votes."""


class TorchrunEnded(TemporaryError):
    """All ranks saved and stopped, because a torchrun was killed. With this status the other torchruns start all again
    as soon as it is back; with 0 they would take the run for finished."""

    raised_by = None

    def __init__(self, step: int, orphan: int):
        """
        Args:
            orphan: a rank that it had started.
        """
        super().__init__(f"step {step}: torchrun of {name_ranks([orphan])} ended; all saved and stopped")


class StopVote:
    """About once a second the ranks agree whether to stop: they stop if any of them received a signal. With the same
    vote rank 0 asks all for a checkpoint."""

    def __init__(self, peers: Peers):
        self.peers = peers
        self.received: list[int] = []
        """Signals that this rank received."""
        self.save_wanted = False
        """Set on rank 0: all shall save a checkpoint."""
        self.save_now = False
        """The result of the last `next_result`: whether all save a checkpoint after this step."""
        self.orphan: int | None = None
        """Once all stop because a torchrun has ended: a rank that it had started."""
        self.pending: PendingMax | None = None
        self.interval = self.steps_left = 1
        """Steps from the next vote to its result; those that are left of the pending one."""
        self.waited = 1
        """Steps from the last vote to its result."""
        self.started_at = time.monotonic()

    def next_result(self) -> int:
        """The signal to stop for, or 0. All ranks call this once per step and get the same result.

        It returns the result of a vote that began some steps earlier, so no rank waits, and starts the next one. An
        all-reduce over many ranks takes as many messages, so there is one about every `VOTE_SECONDS`; rank 0 measures
        how many steps that is, and the vote tells it to all.
        """
        self.steps_left -= 1
        if self.pending and self.steps_left > 0:
            self.save_now = False
            return 0
        result = self.finish()
        if not result:
            self._start()
            if self.peers.world == 1:
                result = self.finish()
        return result

    def _start(self) -> None:
        now = time.monotonic()
        seconds, self.started_at = (now - self.started_at) / self.waited, now
        # Growing slowly: the first steps take less time than a checkpoint, or more than all others.
        steps = min(max(1, int(VOTE_SECONDS / max(seconds, 1e-6))), 2 * self.waited, MOST_STEPS)
        # Only rank 0's measurement counts: others' clocks may differ.
        proposed = steps if self.peers.rank == 0 else 0
        signal_now = self.received[0] if self.received else 0
        orphan = self.peers.rank + 1 if self.peers.orphaned else 0
        self.pending = self.peers.votes.start_max(signal_now, proposed, int(self.save_wanted), orphan)
        self.save_wanted = False
        self.steps_left = self.waited = self.interval

    def finish(self) -> int:
        """Wait for the pending vote. A rank that left without this would leave the others waiting."""
        pending, self.pending, self.save_now = self.pending, None, False
        if not pending:
            return 0
        result, self.interval, save, orphan = pending.result()
        self.save_now, self.orphan = bool(save), orphan - 1 if orphan else None
        return result


@contextmanager
def stop_on_signals(peers: Peers) -> Iterator[StopVote]:
    """Inside, the `SIGNALS` are recorded, so that the loop can end between two steps. SIGHUP stays ignored under nohup.

    A second signal of the same kind has its usual effect, except under torchrun: torchrun forwards signals to its
    processes, so they may receive one twice, and kills those that do not end (TORCH_ELASTIC_SHUTDOWN_TIMEOUT).
    """
    vote = StopVote(peers)

    def record(number, _frame):
        vote.received.append(number)
        if not under_torchrun():
            signal.signal(number, previous[number])

    numbers = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, record) for number in numbers}
    try:
        yield vote
        vote.finish()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_status(stopped_by: int) -> int:
    """Exit status of a run that finished, or was stopped by the signal `stopped_by` (0: none). torchrun treats any
    status but 0 as a failure and would restart the run."""
    return 128 + stopped_by if stopped_by and not under_torchrun() else 0
