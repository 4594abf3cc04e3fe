"""Differences between the clocks of hosts, measured through the store."""

import time
from collections.abc import Callable, Sequence

from torch.distributed.distributed_c10d import Store

from unite_fast.cluster_check.coordinator import wait

ROUNDS = 4
"""Questions to rank 0; the one with the shortest round trip counts."""


def serve_time(store: Store, guests: Sequence[int], seconds: float, now: Callable[[], float] = time.time) -> None:
    """Answer the questions of `measure_offset`, one rank after another. Only rank 0 calls this.

    Raises:
        LostContact: a guest does not ask within `seconds`.
    """
    for guest in guests:
        for k in range(ROUNDS):
            wait(store, f"clock/{guest}/{k}", seconds, f"rank {guest} does not ask for the time")
            store.set(f"clock/{guest}/{k}/now", repr(now()))


def measure_offset(store: Store, rank: int, seconds: float, now: Callable[[], float] = time.time) -> dict[str, float]:
    """This host's clock minus rank 0's, with a bound of the error, in seconds.

    Rank 0 reads its clock between question and answer. If both ways took equally long, that was in the middle; at
    worst the reading is off by half of the round trip (D. Mills, RFC 5905, section 8).
    """
    readings = []
    for k in range(ROUNDS):
        begun, asked = time.monotonic(), now()
        store.set(f"clock/{rank}/{k}", "")
        answer = f"clock/{rank}/{k}/now"
        wait(store, answer, seconds, "rank 0 does not tell the time")
        # The answer is there; reading it is another round trip.
        half = (time.monotonic() - begun) / 2
        readings.append((half, asked + half - float(store.get(answer))))
    half, offset = min(readings)
    return {"offset": offset, "error": half}
