"""The network as training uses it: all-reduce over all ranks, and the links between rank 0's host and the others."""

import time
from collections.abc import Callable, Sequence

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
"""Bytes sent over a link and back; the next one only if it would take less than `PAYLOAD_SECONDS`."""
PAYLOAD_SECONDS = 0.5
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
        seconds: begin no further link after that time.

    Returns:
        On rank 0, by rank: `latency` (s, half of a round trip of 8 bytes, the median) and `bandwidth` (bytes/s one way,
        of the largest payload, the mean of both ways). Elsewhere nothing.
    """
    end, links = time.monotonic() + seconds, {}
    for guest in leaders:
        if ranks.main and guest:
            link = _measure_link(guest, device) if time.monotonic() < end else None
            _tell(guest, 0, device)
            if link:
                links[guest] = link
        elif guest == ranks.rank and guest:
            while size := _told(device):
                _return(torch.empty(size, dtype=torch.uint8, device=device))
    ranks.wait()
    return links


def _measure_link(guest: int, device: torch.device) -> dict[str, float]:
    def round_trip(tensor: Tensor) -> float:
        _tell(guest, tensor.numel(), device)
        begun = time.perf_counter()
        distributed.send(tensor, guest)
        distributed.recv(tensor, guest)
        _wait_for(device)
        return time.perf_counter() - begun

    def shortest(size: int, choose: Callable[[list[float]], float], times: int) -> float:
        tensor = torch.zeros(size, dtype=torch.uint8, device=device)
        round_trip(tensor)  # connects, and fills new memory
        return choose([round_trip(tensor) for _ in range(times)])

    latency = shortest(8, lambda trips: sorted(trips)[len(trips) // 2], PINGS) / 2
    bandwidth, trip = 0.0, 0.0
    for before, size in zip((0, *PAYLOADS), PAYLOADS, strict=False):
        if before and trip * size / before > 2 * PAYLOAD_SECONDS:
            break
        trip = shortest(size, min, TURNS)
        bandwidth = 2 * size / trip
    return {"latency": latency, "bandwidth": bandwidth}


def _return(buffer: Tensor) -> None:
    distributed.recv(buffer, 0)
    distributed.send(buffer, 0)


def _tell(guest: int, size: int, device: torch.device) -> None:
    """Announce a payload, bytes; 0: no more."""
    distributed.send(torch.tensor([size], device=device), guest)


def _told(device: torch.device) -> int:
    size = torch.zeros(1, dtype=torch.int64, device=device)
    distributed.recv(size, 0)
    return int(size)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
