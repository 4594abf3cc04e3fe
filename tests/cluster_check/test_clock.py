"""Differences between clocks."""

import time

from unite_fast.cluster_check.clock import measure_offset, serve_time
from unite_fast.cluster_check.coordinator import open_store
from unite_fast.distributed.process_group import Ranks

OFFSETS = (0.0, 5.0, -70.0)
"""Seconds that the clocks of the ranks are ahead."""


def measure() -> dict | None:
    ranks = Ranks.from_environment()
    store = open_store(ranks, 20)

    def now() -> float:
        return time.time() + OFFSETS[ranks.rank]

    result = serve_time(store, [1, 2], 20, now) if ranks.main else measure_offset(store, ranks.rank, 20, now)
    if not ranks.main:
        store.set(f"measured/{ranks.rank}", "")
    else:
        store.wait(["measured/1", "measured/2"])
    return result


def test_offsets_are_within_their_bound(ranks):
    for expected, result in zip(OFFSETS[1:], ranks(3, measure)[1:], strict=True):
        assert abs(result["offset"] - expected) <= result["error"] + 0.01
        assert 0 < result["error"] < 5
