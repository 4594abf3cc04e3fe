"""The names of the machines on which the ranks run, for messages."""

from collections.abc import Iterable

_hosts: list[str] = []
_guesses: list[str] = []


def use_hosts(hosts: Iterable[str]) -> None:
    """Remember the machine of each rank, in rank order."""
    _hosts[:] = hosts


def guess_hosts(hosts: Iterable[str]) -> None:
    """What is known of the ranks' machines before all have met. `use_hosts` replaces it."""
    _guesses[:] = hosts


def known_hosts() -> list[str]:
    """The machine of each rank; empty before they are known."""
    return list(_hosts)


def name_ranks(ranks: Iterable[int]) -> str:
    """The ranks in words, for a message: "rank 3 on node1 and ranks 8 to 15 on node2". With one machine, or before any
    other is known, without their names."""
    ranks = sorted(ranks)
    if not ranks:
        return "another process"
    hosts = _hosts or _guesses
    if len(set(hosts)) < 2:
        return _numbers(ranks)
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank] if rank < len(hosts) else "an unknown machine", []).append(rank)
    return " and ".join(f"{_numbers(numbers)} on {host}" for host, numbers in by_host.items())


def _numbers(ranks: list[int]) -> str:
    """Sorted ranks: "rank 3", "ranks 1, 3", or "ranks 8 to 15"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
