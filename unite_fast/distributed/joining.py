"""Heartbeats of a process that has not joined the others yet.

Importing, reading settings and listing data takes seconds to minutes. Each rank tells early that it is there, so that
the others notice if its machine vanishes meanwhile.
"""

import socket
import threading
import time

import torch
from torch.distributed.distributed_c10d import Store

from unite_fast.distributed.environment import read_environment
from unite_fast.distributed.hosts import guess_hosts
from unite_fast.distributed.peers import HEARTBEAT, Peers, Trouble
from unite_fast.distributed.store import (
    SILENCE,
    STORE_ERRORS,
    LostContact,
    announced_mistake,
    note_mistake_seen,
    open_store,
)
from unite_fast.distributed.watchdog import Watchdog
from unite_fast.errors import UserError

ENDLESS = 1e6
"""Seconds. `parallel.timeout` limits how long the main thread waits for the others."""
EARLY_SILENCE = SILENCE if torch.version.cuda is None else 60.0
"""`SILENCE` of a rank that joins: while CUDA starts, which takes long with many GPUs, no other thread may run."""
MISTAKE_SECONDS = 30.0
"""Until a rank ends whose main thread has not come to know of another rank's mistake."""


class EarlyPeers(Peers):
    """`Peers` of ranks that have not met. The store may hold heartbeats of an earlier start, so a rank counts only
    after a heartbeat that is new."""

    def __init__(self, peers: Peers, store: Store):
        """
        Args:
            peers: this rank's, without a store.
            store: from `open_store`.
        """
        self.host = socket.gethostname()
        self.known: dict[int, str] = {}
        """Last heartbeat of each rank."""
        self.heard: dict[int, float] = {}
        """When the last new heartbeat of a rank came."""
        self.lost: list[int] = []
        super().__init__(peers.rank, peers.world, store)
        self.agent = peers.agent

    def beat(self) -> None:
        self.beats += 1
        self.store.set(self._key(self.rank), f"{self.beats} {self.host}")
        if self.rank and 0 not in self.known and self.store.check([self._key(0)]):
            self._listen([0])

    def silent_ranks(self) -> list[int]:
        """Ranks that have begun to send heartbeats and sent none for `EARLY_SILENCE` seconds."""
        there = [rank for rank in range(self.world) if rank in self.known or self.store.check([self._key(rank)])]
        self._listen(there)
        now = time.monotonic()
        return [rank for rank, heard in self.heard.items() if now - heard > EARLY_SILENCE]

    def _listen(self, ranks: list[int]) -> None:
        """Read the heartbeats of these ranks, which the store has."""
        for rank, beat in zip(ranks, self.store.multi_get([self._key(rank) for rank in ranks]), strict=True):
            text = beat.decode()
            if rank in self.known and text != self.known[rank]:
                self.heard[rank] = time.monotonic()
            self.known[rank] = text
        hosts = {rank: text.split(" ", 1)[1] for rank, text in self.known.items()} | {self.rank: self.host}
        guess_hosts([hosts.get(rank, "an unknown machine") for rank in range(self.world)])

    @staticmethod
    def _key(rank: int) -> str:
        return f"early/{rank}"

    def was_paused(self) -> None:
        self.heard = dict.fromkeys(list(self.heard), time.monotonic())

    def announce(self, trouble: Trouble) -> None:
        """Only for this rank: the others notice when it ends."""
        self.lost = trouble.lost or []

    def trouble(self) -> Trouble | None:
        if mistake := announced_mistake(self.store):
            return Trouble(mistake=mistake)
        return Trouble(self.lost) if self.lost else None

    def answer_roll_call(self) -> None:
        if announced_mistake(self.store):
            note_mistake_seen(self.store, SILENCE / 2)

    def missing_ranks(self) -> list[int]:
        return self.lost


class Joining(Watchdog):
    """Ends a process that waits for a machine that is gone, or whose torchrun is, before it has joined the others."""

    def __init__(self):
        ranks = read_environment()
        super().__init__(Peers(ranks.rank, ranks.world), ENDLESS)
        self.last_contact = float("inf")  # until there was one

    def _keep_contact(self) -> None:
        try:
            # Rank 0 may still import torch. Its store ends with the last reference to it.
            self.store = open_store(ENDLESS)
            self.peers = EarlyPeers(self.peers, self.store)
        except LostContact as error:
            self._exit(str(error), error.status)
        except UserError:  # of the address, which the main thread reports
            return
        except STORE_ERRORS:
            self._store_gone()
        else:
            self.last_contact = time.monotonic()
            super()._keep_contact()
        del self.store, self.peers.store  # closes two connections

    def _end_by(self, trouble: Trouble) -> None:
        # The main thread of rank 0 also notes a mistake in the run folder, once it gets there.
        deadline = time.monotonic() + (MISTAKE_SECONDS if trouble.mistake else 0)
        while time.monotonic() < deadline and not self.closed.wait(HEARTBEAT):
            self.peers.beat()
            self.last_contact = time.monotonic()
        super()._end_by(trouble)

    def _torchrun_ended(self) -> None:
        # A few heartbeats first: rank 0 notices when they stop.
        deadline = time.monotonic() + SILENCE
        while not (isinstance(self.peers, EarlyPeers) and 0 in self.peers.known) and time.monotonic() < deadline:
            self.closed.wait(0.1)
        self.closed.wait(3 * HEARTBEAT)
        self._exit("torchrun on this machine ended", LostContact.status)


_joining: Joining | None = None


def begin() -> None:
    """Tell the other ranks that this one is there, and watch over them, until `end`."""
    global _joining
    _joining = Joining()
    _joining.__enter__()


def end() -> None:
    """The processes have joined, and their `Watchdog` takes over, or this one ends. Does nothing before `begin`."""
    if _joining is not None:
        _joining.closed.set()
        # Python must not end while a thread is in a request to the store: that aborts the process.
        for thread in _joining.threads:
            if thread is not threading.current_thread():
                thread.join(1.0)
