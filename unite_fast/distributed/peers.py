"""The other ranks of a run: which of them are gone."""

import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.distributed_c10d import Store

from unite_fast.distributed.agent import agent_process, is_orphan
from unite_fast.distributed.process_group import Ranks
from unite_fast.distributed.store import SILENCE, STORE_ERRORS

PATIENCE = 10
"""Factor on the timeout for slow work: start, compilation, checkpoint, pictures, evaluation."""
HEARTBEAT = 1.0
"""Seconds between two heartbeats of a rank."""
ROLL_CALL = 3.0
"""Seconds that ranks have to answer a roll call. torchrun kills survivors after 30."""


@dataclass
class Trouble:
    """Why a run ends early, as all ranks learn it."""

    lost: list[int] | None = None
    """Ranks that are gone; None: a roll call will tell."""
    mistake: str = ""
    """A mistake of the user, and who found it."""


class Peers:
    """Three channels to the other ranks, besides training's own collectives:

    - the store: heartbeats, and trouble that one rank announces to all;
    - the neighbour group: each rank waits for a message from the next one, which fails at once if that rank dies;
    - votes: a CPU group for `start_max`.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: Store | None = None):
        """All ranks call this together.

        Args:
            store: of this start; none for a process alone.
        """
        self.rank, self.world = rank, world
        self.votes = self.neighbours = Ranks(rank, world)
        self.agent = agent_process()
        self.beats = 0
        self.last_beats: list[bytes] = []
        self.heard_at = [time.monotonic()] * world
        if store is not None:
            # A connection of its own, because the main thread may hang in a request on the other one.
            self.store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]  # missing in torch's stub
            self.beat()

    @property
    def orphaned(self) -> bool:
        """Whether the torchrun that started this rank has ended."""
        return self.agent > 0 and (agent_process() != self.agent or is_orphan())

    def open_groups(self) -> None:
        """All ranks call this together, after `init_process_group`."""
        # No timeout: the watchdog decides who waits too long.
        endless = timedelta(days=1000)
        self.votes, self.neighbours = (Ranks(self.rank, self.world).with_own_group(endless) for _ in range(2))

    def beat(self) -> None:
        """Tell the others that this process runs.

        Raises:
            RuntimeError: the store is gone. A request to a store whose machine is gone does not return.
        """
        self.beats += 1
        self.store.set(f"beat/{self.rank}", str(self.beats))

    def silent_ranks(self) -> list[int]:
        """Ranks without a heartbeat for `SILENCE` seconds. Only rank 0 calls this, every second or so.

        Raises:
            RuntimeError: the store is gone.
        """
        keys = [f"beat/{rank}" for rank in range(self.world)]
        if not self.store.check(keys):  # not all have joined
            return []
        now, beats = time.monotonic(), self.store.multi_get(keys)
        for rank, beat in enumerate(beats):
            if not self.last_beats or beat != self.last_beats[rank]:
                self.heard_at[rank] = now
        self.last_beats = beats
        return [rank for rank, heard in enumerate(self.heard_at) if now - heard > SILENCE]

    def was_paused(self) -> None:
        """Forget how long the others were silent: this process itself did not run."""
        self.heard_at = [time.monotonic()] * self.world

    def announce(self, trouble: Trouble) -> None:
        """Tell all ranks why the run ends. The first announcement counts."""
        with suppress(*STORE_ERRORS):  # the store is gone as well
            self.store.compare_set("trouble", "", json.dumps(vars(trouble)))

    def trouble(self) -> Trouble | None:
        """What a rank announced; None: nothing.

        Raises:
            RuntimeError: the store is gone.
        """
        return Trouble(**json.loads(self.store.get("trouble"))) if self.store.check(["trouble"]) else None

    def answer_roll_call(self) -> None:
        """Tell that this rank is there, after it saw that there is trouble.

        Raises:
            RuntimeError: the store is gone.
        """
        self.store.set(f"alive/{self.rank}", "")

    def missing_ranks(self) -> list[int]:
        """The ranks that are gone or frozen: those that rank 0 announced, else those that do not answer a roll call
        within a few seconds. Rank 0 if the store does not answer, which is on its machine."""
        missing: list[int] = []
        # In a thread, because a request to a store whose machine is gone never returns.
        thread = threading.Thread(target=self._find_missing, args=(missing,), daemon=True)
        thread.start()
        thread.join(3 * ROLL_CALL)
        return [0] if thread.is_alive() and self.rank else missing

    def _find_missing(self, missing: list[int]) -> None:
        try:
            self.announce(Trouble())
            trouble = self.trouble()
            if trouble is None or trouble.lost is None:
                self._call_roll(missing)
            else:
                missing += trouble.lost
        except STORE_ERRORS:
            missing[:] = [0] if self.rank else []

    def _call_roll(self, missing: list[int]) -> None:
        keys = {f"alive/{rank}": rank for rank in range(self.world)}
        deadline = time.monotonic() + ROLL_CALL
        while time.monotonic() < deadline and not self.store.check(list(keys)):
            time.sleep(0.05 + 5e-4 * self.world)
        missing += [rank for key, rank in keys.items() if not self.store.check([key])]

    def wait_for_next(self) -> None:
        """Block until the next rank calls `release_previous`.

        Raises:
            RuntimeError: the next rank died.
        """
        distributed.recv(torch.zeros(1), (self.rank + 1) % self.world, self.neighbours.group)

    def release_previous(self) -> None:
        """End the previous rank's `wait_for_next`."""
        distributed.send(torch.zeros(1), (self.rank - 1) % self.world, self.neighbours.group)
