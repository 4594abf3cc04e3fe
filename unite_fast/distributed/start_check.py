"""At the start, all ranks compare how they were started: settings, options, software."""

import hashlib
import json
from collections.abc import Mapping

from torch.distributed.distributed_c10d import Store

from unite_fast.distributed.hosts import name_ranks
from unite_fast.distributed.process_group import Ranks
from unite_fast.distributed.store import gather, wait_for
from unite_fast.errors import CommonError, shown

MOST_NAMED = 3
"""Differences that a message names."""


def check_same_start(values: Mapping[str, object], store: Store, ranks: Ranks, timeout: float) -> None:
    """Compare values of all ranks with rank 0's, through the store: ranks that differ in device or strategy could not
    even open a process group. All ranks call this together.

    Args:
        values: by key; what JSON can hold.

    Raises:
        CommonError: a rank has other values.
        LostContact: a rank ended meanwhile.
    """
    own = json.dumps(values, sort_keys=True, default=str)
    # A digest of each rank; only those that differ are asked for their values.
    store.set(f"start values/{ranks.rank}", own)
    digests = gather(store, "start", hashlib.sha256(own.encode()).hexdigest(), ranks.rank, ranks.world, timeout)
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        first, *others = (json.loads(store.get(f"start values/{rank}")) for rank in (0, *different))
        message = differences(first, dict(zip(different, others, strict=True)))
        # Rank 0 may hold the store, so it waits until all have read it.
        store.set(f"start read/{ranks.rank}", "")
        if ranks.main:
            wait_for(store, [f"start read/{rank}" for rank in range(ranks.world)], timeout)
        raise CommonError(message)


def check_same(values: Mapping[str, object], ranks: Ranks) -> None:
    """The same in a process group, for what is known only later.

    Raises:
        CommonError: a rank has other values than rank 0.
    """
    first, *others = ranks.gather(dict(values))
    different = {rank: other for rank, other in enumerate(others, 1) if other != first}
    if different:
        raise CommonError(differences(first, different))


def differences(first: Mapping[str, object], others: Mapping[int, Mapping[str, object]]) -> str:
    """A line that names key, ranks and values of the first few differences.

    Args:
        first: values of rank 0.
        others: values of the ranks that differ, by rank.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for rank, values in others.items():
        for key in {**first, **values}:
            if values.get(key) != first.get(key):
                found.setdefault((key, shown(values.get(key))), []).append(rank)
    parts = [
        f"{key} is {value} on {name_ranks(at)}, {shown(first.get(key))} on {name_ranks([0])}"
        for (key, value), at in found.items()
    ]
    more = f"; and {len(parts) - MOST_NAMED} more" if len(parts) > MOST_NAMED else ""
    return f"{'; '.join(parts[:MOST_NAMED])}{more}; start all processes with the same command and software"
