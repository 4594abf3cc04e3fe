"""Which ops were faster as compiled PyTorch than as Triton kernels, by card: measured.json, for `kernels=auto`.

A row has the times of an op (forward and backward) at one shape. `benchmarks/kernels.py --record` adds rows, from GPUs
only. The file has none yet: nobody has measured.
"""

import json
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from unite_fast.errors import UserError

FILE = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Row:
    card: str
    """As torch.cuda.get_device_name gives it."""
    op: str
    shape: str
    """As benchmarks/kernels.py prints it: 64x544x768 is batch x tokens x width."""
    dtype: str
    """Of the op's first tensor: bfloat16, or float32 for a float32 residual."""
    winner: str
    """triton, or reference if that is faster under torch.compile."""
    triton_ms: float
    reference_ms: float
    """Under torch.compile."""
    commit: str
    date: str

    @property
    def case(self) -> tuple[str, str, str, str]:
        return self.card, self.op, self.shape, self.dtype


def read(path: Path = FILE) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())]


@cache
def _shipped() -> list[Row]:
    return read()


def covers(card: str) -> bool:
    """Whether there are rows of this card."""
    return any(row.card == card for row in _shipped())


def slower_ops(card: str) -> dict[str, list[str]]:
    """Ops, and the dtypes for which they lose on this card: over all measured shapes together, the compiled reference
    takes less time."""
    gained: dict[tuple[str, str], float] = {}
    for row in _shipped():
        if row.card == card:
            case = row.op, row.dtype
            gained[case] = gained.get(case, 0.0) + row.reference_ms - row.triton_ms
    slower: dict[str, list[str]] = {}
    for (op, dtype), gain in gained.items():
        if gain < 0:
            slower.setdefault(op, []).append(dtype)
    return slower


def record(times: Path, path: Path = FILE) -> list[Row]:
    """Add the times that `benchmarks/kernels.py --device cuda --json` printed; rows of the same case are replaced.

    Returns:
        The new rows.

    Raises:
        UserError: no such file, or no JSON; times of a CPU, of uncommitted code, or without the compiled reference.
    """
    try:
        printed = json.loads(times.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{times} is not what benchmarks/kernels.py --json prints: {error}") from error
    new = _rows(printed, times)
    cases = {row.case for row in new}
    rows = sorted([row for row in read(path) if row.case not in cases] + new, key=lambda row: row.case)
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    aside.replace(path)
    return new


def _rows(times: list[dict], source: Path) -> list[Row]:
    by_case: dict[tuple[str, str, str, str], dict[str, dict]] = {}
    for each in times:
        if not each["cuda"]:
            raise UserError(
                f"{source} has times of {each['card']}, which is no GPU; run the benchmark with --device cuda"
            )
        if not re.fullmatch("[0-9a-f]{7,40}", each["commit"]):
            raise UserError(f"{source} has times of {each['commit'] or 'no commit'}; commit all changes, then measure")
        if each["way"] == "both":
            dtype = each["dtypes"].split()[0].rstrip(",")
            by_case.setdefault((each["card"], each["op"], each["shape"], dtype), {})[each["backend"]] = each
    rows = []
    for case, backends in by_case.items():
        if "triton" not in backends or "compiled" not in backends:
            raise UserError(f"{source} lacks triton or compiled times of {case[1]}; measure without --no-compiled")
        triton, reference = backends["triton"]["ms_p50"], backends["compiled"]["ms_p50"]
        winner = "triton" if triton <= reference else "reference"
        one = backends["triton"]
        rows.append(Row(*case, winner, triton, reference, one["commit"], one["date"]))
    return rows
