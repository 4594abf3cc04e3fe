"""One candidate of `unite-fast tune`: a short `unite-fast bench` in its own process, which may fail or hang."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

from unite_fast.distributed.process_group import Ranks

WARMUP, STEPS, SECONDS = 2, 10, 5.0
"""Warm-up steps, maximum number of timed steps, and seconds for them."""
GRACE = 10.0
"""Seconds from SIGTERM to SIGKILL, for cleanup."""

START = "import sys; sys.path[:1] = []; from unite_fast.cli import main; main()"
"""Not `python -m unite_fast`: that imports from the working directory first, which may be a source tree."""

OK, OUT_OF_MEMORY, OUT_OF_TIME, FAILED = "ok", "out of memory", "out of time", "failed"


@dataclass(frozen=True)
class Trial:
    """Result of a candidate.

    Attributes:
        settings: settings that differ from the recipe, by dotted key.
        status: OK, OUT_OF_MEMORY, OUT_OF_TIME or FAILED.
        wall: seconds, start and compilation included.
        row: the figures of `unite-fast bench`, if OK.
        why: one line, if FAILED.
    """

    settings: dict[str, object]
    status: str
    wall: float
    row: dict | None = None
    why: str = ""

    @property
    def images_per_s(self) -> float:
        """0 unless OK."""
        return self.row["images_per_s"] if self.row else 0.0


def run(words: tuple[str, ...], tuned: dict[str, object], limit: float, ranks: Ranks) -> Trial:
    """Time the recipe `words` with the settings `tuned` for at most `limit` seconds. Collective: each rank starts one
    process, these form their own process group, and all ranks return the same result."""
    start = time.monotonic()
    trials = ranks.gather(_run(words, tuned, limit, _environment(ranks)))
    wall = max(ranks.gather(time.monotonic() - start))
    bad = [trial for trial in trials if trial.status != OK]
    # If one rank runs out of memory, the others fail for loss of contact: report the cause.
    cause = min(bad, key=lambda trial: (OUT_OF_MEMORY, FAILED, OUT_OF_TIME).index(trial.status), default=trials[0])
    return Trial(tuned, cause.status, wall, None if bad else cause.row, cause.why)


def _run(words: tuple[str, ...], tuned: dict, limit: float, environment: dict[str, str]) -> Trial:
    command = bench_command(*words, *map(as_override, tuned.items()))
    command += ["--warmup", str(WARMUP), "--steps", str(STEPS), "--seconds", str(SECONDS)]
    # Its own session, to end it together with its children.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return Trial(tuned, OUT_OF_TIME, limit)
    finally:
        _end(process)
    if process.returncode == 0:
        # Under torchrun only rank 0 prints the row.
        row = printed_row(out)
        if row is None and environment.get("RANK", "0") == "0":
            return Trial(tuned, FAILED, 0.0, None, "unite-fast bench printed no figures")
        return Trial(tuned, OK, 0.0, row)
    status, why = explain(process.returncode, err)
    return Trial(tuned, status, 0.0, None, why)


def bench_command(*words: str) -> list[str]:
    """A command that prints the figures of `unite-fast bench WORDS` as JSON (see `printed_row`) and writes no table."""
    return [sys.executable, "-c", START, "bench", *words, "--json", "--csv", ""]


def printed_row(out: str) -> dict | None:
    """The JSON object that `unite-fast bench --json` printed, or None. Ignores what libraries print before and after it
    (NCCL logs to stdout)."""
    lines = out.splitlines()
    with suppress(ValueError):
        row = json.loads("\n".join(lines[lines.index("{") : len(lines) - lines[::-1].index("}")]))
        return row if isinstance(row, dict) else None
    return None


def _end(process: subprocess.Popen) -> None:
    """End a process and its children, if still running."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            continue


def explain(returncode: int, err: str) -> tuple[str, str]:
    """Status and reason of a failed process, from its exit status and stderr."""
    if returncode < 0:
        name = signal.Signals(-returncode).name
        hint = ", perhaps out of memory" if name == "SIGKILL" else ""
        return FAILED, f"killed by {name}{hint}"
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    why = (errors or lines or [f"exit status {returncode}"])[-1].removeprefix("error: ")
    if "out of memory" in why.lower() or "outofmemory" in err.lower().replace(" ", ""):
        return OUT_OF_MEMORY, ""
    return FAILED, why


def as_override(setting: tuple[str, object]) -> str:
    key, value = setting
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def _environment(ranks: Ranks) -> dict[str, str]:
    """Environment of the candidate processes: they rendezvous at a free port."""
    if ranks.world == 1:
        return dict(os.environ)
    with socket.socket() as free:
        free.bind(("", 0))
        port = ranks.broadcast(free.getsockname()[1])
    # torchrun's store belongs to the ranks of the search.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    return inherited | {"MASTER_PORT": str(port)}
