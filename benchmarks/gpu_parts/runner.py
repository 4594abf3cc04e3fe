"""Runs the parts of gpu.py in subprocesses with time limits, and writes their results."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from gpu_parts import RESULT, SIDE_BY_SIDE, Part, summary

SCRIPT = Path(__file__).parents[1] / "gpu.py"
RESERVE = 4.0
"""Seconds of the budget reserved for the summary."""
SHORTEST = 12.0
"""Minimum seconds for a part to start."""
PARALLEL_ON_CPU = 2
LOG_BYTES = 12_000_000
"""Maximum size of log.txt."""


class Runner:
    def __init__(self, options: Namespace, parts: Sequence[Part]):
        self.options = options
        names = options.only.split(",") if options.only else [part.name for part in parts]
        self.parts = [part for part in parts if part.name in names]
        options.out.mkdir(parents=True, exist_ok=True)
        self.started, self.lock = time.monotonic(), threading.Lock()
        self.lines: list[dict] = []
        self.logged = 0
        self.results = (options.out / "results.jsonl").open("w")
        self.log = (options.out / "log.txt").open("w")

    def run(self) -> int:
        """Run all parts; return the exit status of the command."""
        self.write(
            {"part": "start", "name": "command", "ok": None, "argv": sys.argv, "date": time.strftime("%Y-%m-%d %H:%M")}
        )
        parallel = [part for part in self.parts if part.how == SIDE_BY_SIDE]
        first = [part for part in self.parts if part.name == "env"]
        later = [part for part in self.parts if part not in parallel and part not in first]
        for part in first:
            self.run_part(part)
        if parallel:
            workers = len(parallel) if self.options.device == "cuda" else PARALLEL_ON_CPU
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(self.run_part, parallel))
        for part in later:
            self.run_part(part)
        wrong = sum(line["ok"] is False for line in self.lines)
        self.write({"part": "end", "name": "all", "ok": not wrong, "wrong": wrong, "seconds": self.spent()})
        text = summary.make(self.lines)
        (self.options.out / "summary.md").write_text(text)
        print(f"\n{text}", flush=True)
        return int(bool(wrong))

    def spent(self) -> float:
        return round(time.monotonic() - self.started, 1)

    def write(self, line: dict) -> None:
        line = {"at": self.spent(), **line}
        with self.lock:
            self.lines.append(line)
            print(summary_line(line), flush=True)
            self.results.write(json.dumps(line) + "\n")
            self.results.flush()

    def run_part(self, part: Part) -> None:
        """Run a part and write a line on how it ended, whatever happens."""
        if part.cuda_only and self.options.device != "cuda":
            self.write({"part": part.name, "name": "skipped", "ok": None, "why": "needs a CUDA device"})
            return
        left = self.options.budget - RESERVE - self.spent()
        if left < SHORTEST:
            self.write(
                {"part": part.name, "name": "skipped", "ok": None, "why": f"{left:.0f} s of the budget are left"}
            )
            return
        limit, start = min(part.limit, left), time.monotonic()
        command = [sys.executable, str(SCRIPT), "--part", part.name, "--device", self.options.device]
        command += ["--tiny"] * self.options.tiny
        # Its own session, so that its children can be killed with it.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
            env=environment(),
            cwd=scratch(),  # not the repository root, where ./unite_fast would shadow the installed package
            start_new_session=True,
        )
        tail: list[str] = []
        reader = threading.Thread(target=self.read, args=(part.name, process, tail), daemon=True)
        reader.start()
        late = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = True
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also leftovers of a part that ended
        process.wait()
        reader.join(5)  # a process outside the group may keep the pipe open
        took, status = round(time.monotonic() - start, 1), process.returncode
        end = {"part": part.name, "name": "part ended", "ok": status == 0 and not late, "seconds": took}
        if late:
            end |= {"error": f"stopped after {limit:.0f} s", "tail": "".join(tail[-8:])[-800:]}
        elif status:
            end |= {"error": f"exit status {status}", "tail": "".join(tail[-12:])[-1200:]}
        self.write(end)

    def read(self, name: str, process: subprocess.Popen, tail: list[str]) -> None:
        """Write results; log other lines."""
        for text in process.stdout:
            if text.startswith(RESULT):
                with suppress(json.JSONDecodeError):  # truncated because its process was killed
                    self.write(json.loads(text.removeprefix(RESULT)))
                continue
            if text == "\n":
                continue
            tail.append(text)
            del tail[:-60]
            with self.lock:
                self.logged += len(text) + len(name) + 3
                if self.logged < LOG_BYTES:
                    self.log.write(f"[{name}] {text}")
                    self.log.flush()


def summary_line(line: dict) -> str:
    """A result as one line for the terminal; more details if it is wrong."""
    facts = json.dumps({key: value for key, value in line.items() if key not in ("at", "part", "name", "ok")})
    limit = 1500 if line["ok"] is False else 170
    verdict = {True: "right", False: "WRONG", None: "     "}[line["ok"]]
    facts = facts if len(facts) < limit else facts[:limit] + " ..."
    return f"{line['at']:6.1f} {verdict} {line['part']}: {line['name']} {facts}"


def scratch() -> Path:
    """Folder for compiler caches and runs, shared by all parts and by later commands."""
    folder = Path(tempfile.gettempdir()) / f"unite_fast_gpu_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


def environment() -> dict[str, str]:
    """Environment of the parts, which share the caches of Inductor and Triton."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(scratch() / "inductor"), "TRITON_CACHE_DIR": str(scratch() / "triton")}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
    return {**os.environ, **caches, **threads, "PYTHONUNBUFFERED": "1"}
