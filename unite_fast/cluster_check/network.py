"""The network as training uses it: all-reduce over all ranks, and the links between rank 0's host and the others."""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import require

SIZES = (8, 2**16, 2**20, 2**24, 2**28)
"""Bytes of the all-reduces."""
LONGEST = 3.0
"""Seconds: a size that would take longer is left out, and so are those above it."""
TIMED = 0.5
"""Seconds of all-reduces to time per size, at least two of them and at most 20."""
PINGS = 8
PAYLOADS = (2**16, 2**22, 2**26)
"""Bytes sent over a link and back; the next one only if the link's share of the time suffices."""
TURNS = 2


def all_reduce_by_size(ranks: Ranks, device: torch.device, sizes: Sequence[int]) -> list[dict]:
    """Time all-reduces of float32 sums over all ranks, which call this together.

    Returns:
        For each size `bytes`, `seconds` (of the slowest rank) and `bus_bandwidth` in bytes/s (see `bus_bandwidth`).

    Raises:
        UserError: a sum is wrong.
    """
    rows: list[dict] = []
    _seconds(torch.ones(1, device=device))  # connects
    for size in sizes:
        last = rows[-1] if rows else None
        # From 8 bytes to the next size the time hardly grows: latency.
        if last and last["bytes"] > 8 and last["seconds"] * size / last["bytes"] > LONGEST:
            break
        tensor = torch.ones(size // 4, device=device)
        once = _slowest(_seconds(tensor))
        require(
            bool((tensor == ranks.world).all()), f"an all-reduce of {size} bytes gave wrong sums: replace the network"
        )
        tensor.zero_()  # sums of ones would overflow
        ranks.wait()
        times = max(2, min(20, int(TIMED / once)))
        seconds = _slowest(sum(_seconds(tensor) for _ in range(times)) / times)
        rows.append({"bytes": size, "seconds": seconds, "bus_bandwidth": bus_bandwidth(size, seconds, ranks.world)})
    return rows


def bus_bandwidth(size: int, seconds: float, world: int) -> float:
    """Bytes/s that each rank must send and receive for an all-reduce at this speed, whatever its algorithm:
    size / seconds * 2 (n - 1) / n for n ranks. It compares with the speed of the hardware's slowest link.

    The formula is that of nccl-tests:
    https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
    """
    return size / seconds * 2 * (world - 1) / world


def _seconds(tensor: Tensor) -> float:
    """Seconds of one all-reduce, in place."""
    _wait_for(tensor.device)
    begun = time.perf_counter()
    distributed.all_reduce(tensor)
    _wait_for(tensor.device)
    return time.perf_counter() - begun


def _slowest(seconds: float) -> float:
    """The longest time of any rank, so that all of them decide alike."""
    longest = torch.tensor([seconds], dtype=torch.float64)
    distributed.all_reduce(longest, distributed.ReduceOp.MAX)
    return float(longest)


def link_speeds(
    ranks: Ranks, leaders: Sequence[int], device: torch.device, seconds: float
) -> dict[int, dict[str, float]]:
    """Measure the link from rank 0 to the first rank of each other host, one after another. All ranks call this.

    Args:
        leaders: the first rank of each host, rank 0 among them.
        seconds: for all links; after that time no further one is measured.

    Returns:
        On rank 0, by rank: `latency` (s, half of a round trip of 8 bytes, the median) and `bandwidth` (bytes/s one way,
        of the largest payload, the mean of both ways). Elsewhere nothing.
    """
    end, links = time.monotonic() + seconds, {}
    guests = [leader for leader in leaders if leader]
    for guest in guests:
        if ranks.main:
            if time.monotonic() < end:
                links[guest] = _measure_link(guest, device, seconds / len(guests))
            _announce(guest, 0, 0, device)
        elif guest == ranks.rank:
            while (plan := _announced(device))[0]:
                _return(*plan, device)
    ranks.wait()
    return links


def _measure_link(guest: int, device: torch.device, seconds: float) -> dict[str, float]:
    latency = statistics.median(_round_trips(guest, 8, PINGS, device)) / 2
    trip, bandwidth = 0.0, 0.0
    for size, before in zip(PAYLOADS, (0, *PAYLOADS), strict=False):
        # The next payload takes longer in proportion, and so do its turns.
        if before and trip * size / before * (TURNS + 1) > seconds:
            break
        trip = min(_round_trips(guest, size, TURNS, device))
        bandwidth = 2 * size / trip
    return {"latency": latency, "bandwidth": bandwidth}


def _round_trips(guest: int, size: int, turns: int, device: torch.device) -> list[float]:
    """Seconds of each of `turns` round trips, after one that connects and fills new memory."""
    _announce(guest, size, turns + 1, device)
    there, back = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    trips = []
    for _ in range(turns + 1):
        _wait_for(device)
        begun = time.perf_counter()
        _exchange(there, back, guest)
        _wait_for(device)
        trips.append(time.perf_counter() - begun)
    return trips[1:]


def _return(size: int, turns: int, device: torch.device) -> None:
    """The guest's side of `_round_trips`."""
    one, other = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    distributed.recv(one, 0)
    for _ in range(turns - 1):
        _exchange(one, other, 0)
    distributed.send(one, 0)
    _wait_for(device)


def _exchange(there: Tensor, back: Tensor, rank: int) -> None:
    """Send a tensor and receive the next. Gloo sends only after the receiver said that it waits, so it says so early;
    NCCL's operations on a stream follow each other, so there the send comes first."""
    if there.device.type == "cuda":
        distributed.send(there, rank)
        distributed.recv(back, rank)
        return
    receiving = distributed.irecv(back, rank)
    distributed.send(there, rank)
    assert receiving is not None  # this rank is in the group
    receiving.wait()


def _announce(guest: int, size: int, turns: int, device: torch.device) -> None:
    """Tell what comes: payloads of `size` bytes; 0: nothing more."""
    distributed.send(torch.tensor([size, turns], device=device), guest)


def _announced(device: torch.device) -> tuple[int, int]:
    plan = torch.zeros(2, dtype=torch.int64, device=device)
    distributed.recv(plan, 0)
    size, turns = plan.tolist()
    return size, turns


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
