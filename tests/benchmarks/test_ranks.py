"""The benchmark of many ranks, on few."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ranks.py"


def table(*options: str) -> dict[int, list[float]]:
    """The numbers of each row, by ranks."""
    ended = subprocess.run((sys.executable, SCRIPT, "--ranks", *options), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    rows = (line.split() for line in ended.stdout.splitlines()[1:])
    return {int(ranks): list(map(float, numbers)) for ranks, *numbers in rows}


def test_ranks_connect_only_where_they_exchange_something():
    """The vote, the ring of neighbours and a barrier need few connections; a full mesh of three groups 3 x 5."""
    (lazy,), (full,) = table("6").values(), table("6", "--full-mesh").values()
    assert len(lazy) == len(full) == 9
    assert all(seconds >= 0 for seconds in lazy[2:])
    assert lazy[1] < full[1] and full[1] >= 15
