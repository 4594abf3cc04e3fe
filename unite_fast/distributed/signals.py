"""Signals that ask a run to save and stop: all ranks stop after the same step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from unite_fast.distributed.launch import under_torchrun
from unite_fast.distributed.peers import Peers
from unite_fast.distributed.process_group import PendingMax

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Slurm can send SIGUSR1 some time before a job's limit, and a terminal that closes sends SIGHUP."""


class StopVote:
    """Once per step the ranks agree whether to stop: they stop if any of them received a signal."""

    def __init__(self, peers: Peers):
        self.peers = peers
        self.received: list[int] = []
        """Signals that this rank received."""
        self.pending: PendingMax | None = None

    def next_result(self) -> int:
        """The signal to stop for, or 0. All ranks call this once per step and get the same result.

        It returns the vote started one step earlier, so no rank waits, and starts the next one.
        """
        result = self.finish()
        if not result:
            self.pending = self.peers.votes.start_max(self.received[0] if self.received else 0)
            if self.peers.world == 1:
                result = self.finish()
        return result

    def finish(self) -> int:
        """Wait for the pending vote. A rank that left without this would leave the others waiting."""
        pending, self.pending = self.pending, None
        return pending.result() if pending else 0


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
