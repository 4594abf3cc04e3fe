"""Parts of the check, run by all ranks together through torchrun's store, so that one that hangs is named.

The store needs only TCP to one address, so it works where the process group does not.
"""

import json
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import Store

from unite_fast.distributed.process_group import Ranks
from unite_fast.distributed.store import STORE_ERRORS, LostContact, fresh_store
from unite_fast.errors import UserError, printable, reason_of

SLACK = 4.0
"""Seconds that ranks may differ in starting a part."""
SHORTEST = 2.0
"""Seconds: a part that would have less is skipped."""
LONGEST_ERROR = 300
"""Characters of an error from a library, which may hold addresses of its source files."""


@dataclass(frozen=True)
class Outcome:
    """What a rank's share of a part gave.

    Attributes:
        value: the result, of types that JSON has.
        error: one line if it failed; empty if not.
        late: it did not end within its limit; `error` says so.
        skipped: it was not run; `error` says why.
    """

    value: Any = None
    error: str = ""
    late: bool = False
    skipped: bool = False

    @property
    def ok(self) -> bool:
        return not self.error


def run_limited(work: Callable[[], Any], seconds: float) -> Outcome:
    """Run `work` in a thread and wait for at most `seconds`; a thread that hangs is left behind."""
    results: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put(Outcome(work()))
        except BaseException as error:  # whatever ends this thread is the outcome
            kind = "" if isinstance(error, UserError | OSError) else f"{type(error).__name__}: "
            path = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
            # Gloo names its source file and line.
            reason = re.sub(r"\[/\S+:\d+\] ?", "", reason_of(error))
            results.put(Outcome(error=printable(f"{kind}{path}{reason}")[:LONGEST_ERROR]))

    threading.Thread(target=run, daemon=True).start()
    try:
        return results.get(timeout=seconds)
    except queue.Empty:
        return Outcome(error=f"not finished after {seconds:.0f} s", late=True)


def open_store(ranks: Ranks, seconds: float) -> Store | None:
    """The store of this start, see `fresh_store`; None for one process.

    Raises:
        UserError: this host cannot reach it, or other ranks did not come; the message names both.
    """
    if ranks.world == 1:
        return None
    address = f"{os.environ['MASTER_ADDR']} port {os.environ['MASTER_PORT']}"
    try:
        return fresh_store(seconds)
    except LostContact as error:
        raise LostContact(
            f"host {socket.gethostname()}, with MASTER_ADDR {address}: {error}; look at the output of the other hosts"
        ) from error


def _has(store: Store, key: str) -> bool:
    with suppress(*STORE_ERRORS):
        return store.check([key])
    return False


class Coordinator:
    """Runs parts on all ranks, one after another. Rank 0 collects the outcomes and says when the next part begins.

    Attributes:
        absent: ranks that do not answer, and the part in which they stopped; the same on all ranks that answer.
        late: whether a thread of this rank was left behind.
    """

    def __init__(self, ranks: Ranks, store: Store | None, seconds: float):
        """
        Args:
            store: from `open_store`.
            seconds: for all parts together.
        """
        self.ranks, self.store = ranks, store
        self.absent: dict[int, str] = {}
        self.late = False
        self.failed: set[str] = set()
        """Parts in which a rank failed or was absent."""
        self.end = time.monotonic() + seconds
        self.left = seconds

    def run(self, part: str, work: Callable[[], Any], seconds: float, needs: Sequence[str] = ()) -> dict[int, Outcome]:
        """Run `work` on every rank; all ranks call this with the same part, limit and needs.

        Args:
            seconds: limit of this part; less if the check's time is nearly up.
            needs: earlier parts that must have succeeded on all ranks.

        Returns:
            On rank 0 the outcome of every rank that answered, elsewhere nothing.
        """
        limit = min(seconds, self.left)
        broken = [need for need in needs if need in self.failed]
        begun = time.monotonic()
        if broken:
            outcome = Outcome(error=f"skipped, because this failed: {broken[0]}", skipped=True)
        elif limit < SHORTEST:
            outcome = Outcome(error="skipped, because the check's time was up", skipped=True)
        else:
            outcome = run_limited(work, limit)
        self.late |= outcome.late
        outcomes = self._collect(part, outcome, max(limit - (time.monotonic() - begun), 0) + SLACK)
        self.left = min(self.left, self.end - time.monotonic()) if self.store is None else self.left
        return outcomes

    def broadcast(self, key: str, value: Any) -> Any:
        """Rank 0's value, of types that JSON has.

        Raises:
            UserError: rank 0 does not answer.
        """
        if self.store is None:
            return value
        if self.ranks.main:
            self.store.set(f"broadcast {key}", json.dumps(value))
            return value
        return json.loads(self._from_first(f"broadcast {key}", 3 * SLACK, key))

    def leave(self) -> None:
        """End together: rank 0 may hold the store, so it waits a little for the others' last answer."""
        if self.store is None:
            return
        with suppress(*STORE_ERRORS):
            if self.ranks.main:
                others = [rank for rank in range(1, self.ranks.world) if rank not in self.absent]
                self.store.wait([f"left/{rank}" for rank in others], timedelta(seconds=SLACK))
            else:
                self.store.set(f"left/{self.ranks.rank}", "")

    def _collect(self, part: str, outcome: Outcome, seconds: float) -> dict[int, Outcome]:
        if self.store is None:
            self._record({0: outcome}, part)
            return {0: outcome}
        if not self.ranks.main:
            self.store.set(f"{part}/{self.ranks.rank}", json.dumps(vars(outcome)))
            # Rank 0 waits for the slowest rank, which may have begun later than this one.
            state = json.loads(self._from_first(f"{part}/state", seconds + 2 * SLACK, part))
            self.absent = {int(rank): since for rank, since in state["absent"].items()}
            self.failed, self.left = set(state["failed"]), state["left"]
            if self.ranks.rank in self.absent:
                raise UserError(f"host {socket.gethostname()} was too slow in the part {part}: rank 0 went on without")
            return {}
        outcomes = {0: outcome} | self._outcomes_of_others(part, seconds)
        for rank in range(self.ranks.world):
            if rank not in outcomes:
                self.absent.setdefault(rank, part)
        self._record(outcomes, part)
        self.left = self.end - time.monotonic()
        state = {"absent": self.absent, "failed": sorted(self.failed), "left": self.left}
        self.store.set(f"{part}/state", json.dumps(state))
        return outcomes

    def _record(self, outcomes: dict[int, Outcome], part: str) -> None:
        if len(outcomes) < self.ranks.world or not all(outcome.ok for outcome in outcomes.values()):
            self.failed.add(part)

    def _outcomes_of_others(self, part: str, seconds: float) -> dict[int, Outcome]:
        assert self.store is not None
        keys = {rank: f"{part}/{rank}" for rank in range(1, self.ranks.world) if rank not in self.absent}
        try:
            self.store.wait(list(keys.values()), timedelta(seconds=seconds))
        except STORE_ERRORS:
            keys = {rank: key for rank, key in keys.items() if _has(self.store, key)}
        values = self.store.multi_get(list(keys.values())) if keys else []
        return {rank: Outcome(**json.loads(value)) for rank, value in zip(keys, values, strict=True)}

    def _from_first(self, key: str, seconds: float, part: str) -> str:
        assert self.store is not None
        return get(self.store, key, seconds, f"host {socket.gethostname()}: no answer from rank 0 in the part {part}")


def get(store: Store, key: str, seconds: float, message: str) -> str:
    """The value of a key of the store.

    Raises:
        LostContact: with `message`; the key was not written within `seconds`.
    """
    wait(store, key, seconds, message)
    try:
        return store.get(key).decode()
    except STORE_ERRORS as error:  # its process ended in between
        raise LostContact(message) from error


def wait(store: Store, key: str, seconds: float, message: str) -> None:
    """Wait for a key of the store.

    Raises:
        LostContact: with `message`; the key was not written within `seconds`.
    """
    try:
        store.wait([key], timedelta(seconds=seconds))
    except STORE_ERRORS as error:
        raise LostContact(message) from error
