"""Signals that ask a run to save and end: all ranks stop after the same step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from unite_fast.distributed.launch import under_torchrun
from unite_fast.distributed.peers import Peers
from unite_fast.distributed.process_group import Largest

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Slurm sends the last one before a job's time is over."""


class Stop:
    """Whether the processes of a run should end after this step: a signal came to one of them, and all know it."""

    def __init__(self, peers: Peers):
        self.peers = peers
        self.received: list[int] = []
        """Signals that came to this process."""
        self.vote: Largest | None = None

    def agreed(self) -> int:
        """The signal to stop for, 0 if there is none. All processes ask once a step and get the same answer; it takes
        one step, so that nobody waits for it."""
        wanted = self.finish()
        if not wanted:
            self.vote = self.peers.largest(self.received[0] if self.received else 0)
            if self.peers.world == 1:
                wanted = self.finish()
        return wanted

    def finish(self) -> int:
        """The answer to what was asked last, so that no process leaves while others still wait for its."""
        vote, self.vote = self.vote, None
        return vote.result() if vote else 0


@contextmanager
def stop_on_signals(peers: Peers) -> Iterator[Stop]:
    """Inside, SIGTERM, SIGINT and SIGUSR1 are remembered, so that the loop can end between two steps.

    A second one of the same kind acts as it would without us. Not under torchrun: its processes get what is sent to all
    of a job a second time from torchrun, which kills them by itself after a while (TORCH_ELASTIC_SHUTDOWN_TIMEOUT).
    """
    stop = Stop(peers)

    def remember(number, _frame):
        stop.received.append(number)
        if not under_torchrun():
            signal.signal(number, before[number])

    before = {number: signal.signal(number, remember) for number in SIGNALS}
    try:
        yield stop
        stop.finish()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_status(stopped_by: int) -> int:
    """Of a process that ended as it should, perhaps because of a signal. torchrun would take anything but 0 for a
    failure, and start the processes again."""
    return 128 + stopped_by if stopped_by and not under_torchrun() else 0
