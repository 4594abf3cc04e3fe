"""The other ranks of a run: which of them are gone."""

import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed import distributed_c10d

from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError

TEMPORARY = 75
"""Exit status of a rank that lost contact with another: EX_TEMPFAIL of sysexits.h, "try again later"."""
PATIENCE = 10
"""Factor on the timeout for slow work: start, compilation, checkpoint, pictures, evaluation."""
ROLL_CALL = 3.0
"""Seconds that ranks have to answer a roll call. torchrun kills survivors after 30."""


class LostContact(UserError):
    """Another rank is gone or does not answer. Not a mistake of the user: restart and resume."""

    status = TEMPORARY


class Peers:
    """Three channels to the other ranks, besides training's own collectives:

    - votes: a CPU group for `start_max`;
    - the neighbour group: each rank waits for a message from the next one, which fails if that rank dies;
    - torchrun's store: for a roll call, when collectives no longer work.
    """

    def __init__(self, rank: int = 0, world: int = 1):
        """All ranks call this together, after `init_process_group`."""
        self.rank, self.world = rank, world
        # No timeout: the watchdog decides who waits too long.
        endless = timedelta(days=1000)
        self.votes, self.neighbours = (Ranks(rank, world).with_own_group(endless) for _ in range(2))
        if world > 1:
            # A connection of its own, because the main thread may hang in a request on the other one.
            store = distributed_c10d._get_default_store()
            self.store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]  # missing in torch's stub

    def wait_for_next(self) -> None:
        """Block until the next rank calls `release_previous`.

        Raises:
            RuntimeError: the next rank died.
        """
        distributed.recv(torch.zeros(1), (self.rank + 1) % self.world, self.neighbours.group)

    def release_previous(self) -> None:
        """End the previous rank's `wait_for_next`."""
        distributed.send(torch.zeros(1), (self.rank - 1) % self.world, self.neighbours.group)

    def call_roll(self) -> None:
        """Ask all ranks to answer, because contact with one of them broke."""
        with suppress(RuntimeError):  # the store is gone as well
            self.store.set("roll call", "")

    def answer_roll_call(self) -> bool:
        """Answer the roll call if there is one. Returns whether there is."""
        with suppress(RuntimeError):
            if self.store.check(["roll call"]):
                self.store.set(f"alive/{self.rank}", "")
                return True
        return False

    def missing_ranks(self) -> list[int]:
        """Call the roll; returns the ranks that do not answer within a few seconds, because they are gone or frozen.
        Empty if the store itself does not answer."""
        missing: list[int] = []
        # In a thread, because a request to a store whose machine is gone never returns.
        thread = threading.Thread(target=self._find_missing, args=(missing,), daemon=True)
        thread.start()
        thread.join(2 * ROLL_CALL)
        return missing

    def _find_missing(self, missing: list[int]) -> None:
        keys = {f"alive/{rank}": rank for rank in range(self.world)}
        self.call_roll()
        deadline = time.monotonic() + ROLL_CALL
        with suppress(RuntimeError):
            while time.monotonic() < deadline and not self.store.check(list(keys)):
                time.sleep(0.05)
            missing += [rank for key, rank in keys.items() if not self.store.check([key])]


def name_ranks(ranks: list[int]) -> str:
    """The ranks in words, for a message."""
    if not ranks:
        return "another process"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
