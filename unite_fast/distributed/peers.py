"""The other processes of a run: finding out which of them are gone."""

import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed import distributed_c10d

from unite_fast.distributed.process_group import Largest, Ranks
from unite_fast.errors import UserError

TEMPORARY = 75
"""Exit status of a process that lost contact with another: sysexits.h's "try again later"."""
PATIENCE = 10
"""Factor by which a start, a compilation, a checkpoint, pictures and an evaluation may exceed the ordinary timeout."""
ROLL_CALL = 3.0
"""Seconds that ranks have to answer after a contact broke. torchrun kills after 30."""


class LostContact(UserError):
    """Another process of the run is gone or does not answer. Not the user's mistake; a restart resumes."""

    status = TEMPORARY


class Peers:
    """The other ranks, reached by three ways besides training's collectives: votes on the CPU; a receive from the next
    rank, which fails when that rank dies; torchrun's store, which works when the others do not."""

    def __init__(self, rank: int = 0, world: int = 1):
        """All ranks call this together, after `init_process_group`."""
        self.rank, self.world = rank, world
        self.votes = Ranks(rank, world)
        self.line = self.store = None
        if world > 1:
            # No timeout: the watchdog decides who waits too long.
            endless = timedelta(days=1000)
            self.votes = self.votes.with_own_group(endless)
            self.line = distributed.new_group(backend="gloo", timeout=endless)
            # A connection of its own: the main thread may hang in a request on the other.
            self.store = distributed_c10d._get_default_store().clone()

    def largest(self, number: int) -> Largest:
        """Start to find the largest of the numbers that the ranks give; see `Ranks.largest`."""
        return self.votes.largest(number)

    def wait_for_next(self) -> None:
        """Until the next rank hangs up.

        Raises:
            RuntimeError: it died.
        """
        distributed.recv(torch.zeros(1), (self.rank + 1) % self.world, self.line)

    def hang_up(self) -> None:
        distributed.send(torch.zeros(1), (self.rank - 1) % self.world, self.line)

    def call_roll(self) -> None:
        """Let all processes know that contact broke."""
        with suppress(RuntimeError):  # the store is gone as well
            self.store.set("roll call", "")

    def called(self) -> bool:
        """Whether there is a roll call, and if so answer it."""
        with suppress(RuntimeError):
            if self.store.check(["roll call"]):
                self.store.set(f"alive/{self.rank}", "")
                return True
        return False

    def silent(self) -> list[int]:
        """Ranks that do not answer a roll call within a few seconds: gone, or frozen."""
        missing: list[int] = []
        # In a thread of its own, because a store whose machine is gone answers nothing at all.
        counting = threading.Thread(target=self._count, args=(missing,), daemon=True)
        counting.start()
        counting.join(2 * ROLL_CALL)
        return missing

    def _count(self, missing: list[int]) -> None:
        keys = {f"alive/{rank}": rank for rank in range(self.world)}
        self.call_roll()
        end = time.monotonic() + ROLL_CALL
        with suppress(RuntimeError):
            while time.monotonic() < end and not self.store.check(list(keys)):
                time.sleep(0.05)
            missing += [rank for key, rank in keys.items() if not self.store.check([key])]


def named(ranks: list[int]) -> str:
    if not ranks:
        return "another process"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
