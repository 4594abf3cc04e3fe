"""A job of torchrun over the hosts of a cluster, and the times at which things happen to it."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from unite_fast.training.run_folder import read_status
from unite_fast.utils.rows import read_rows

LIMIT = 300.0
"""Seconds to wait for anything. On two busy cores a start takes half a minute."""
PORT = 29400


class Job:
    """`torchrun ... -m unite_fast ARGUMENTS`, a command on each host.

    Args:
        per_host: ranks on each.
        nodes: torchrun's --nnodes.
        head: the host at which the torchruns meet.
    """

    def __init__(
        self, hosts, folder: Path, arguments: list[str], per_host: int = 1, nodes: str = "2", head: str = "node1"
    ):
        self.hosts, self.folder, self.arguments = hosts, folder, arguments
        self.per_host, self.nodes, self.head = per_host, nodes, head
        self.commands: list = []

    def start(self, *numbers: int, more: tuple[str, ...] = (), restarts: int = 3) -> None:
        """Start torchrun on these hosts.

        Args:
            more: further arguments.
        """
        for number in numbers:
            flags = [
                *("--nnodes", self.nodes, "--nproc-per-node", str(self.per_host), "--max-restarts", str(restarts)),
                *("--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", f"{self.head}:{PORT}"),
            ]
            command = [sys.executable, "-m", "torch.distributed.run", *flags, "-m", "unite_fast", *self.arguments]
            env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
            self.commands.append(self.hosts.run(number, [*command, *more], env, self.folder.parent))

    def ended(self, *numbers: int) -> bool:
        """Whether torchrun ended on these hosts; by default on all."""
        return all(command.ended() for command in self.commands if not numbers or command.host in numbers)

    def statuses(self) -> list[int | None]:
        """Exit statuses of the commands, in the order of their starts."""
        return [command.status for command in self.commands]

    def ranks(self) -> dict[int, int]:
        """Process ids by rank, on all hosts."""
        found: dict[int, int] = {}
        for number in self.hosts.hosts:
            found |= self.hosts.ranks(number)
        return found

    def printed(self, *numbers: int) -> str:
        """The output on these hosts; by default on all."""
        chosen = [command for command in self.commands if not numbers or command.host in numbers]
        return "\n".join(f"--- host {command.host}\n{command.printed()}" for command in chosen)

    def errors(self, *numbers: int) -> list[str]:
        """Lines with an error of unite_fast."""
        return [line for line in self.printed(*numbers).splitlines() if re.match(r"(\[[^]]*\]: ?)?error: ", line)]

    def step(self) -> int:
        """The last step in the metrics."""
        return max((row["step"] for row in read_rows(self.folder / "metrics.jsonl")), default=0)

    def rows_written(self) -> int:
        """Rows of the metrics on the terminals, those that a restart writes again included."""
        return len(re.findall(r"(?m)^(?:\[[^]]*\]:)?step \d+/", self.printed()))

    def status(self) -> str:
        return read_status(self.folder)

    def finished(self) -> bool:
        return self.status().startswith("finished")

    def wait_until_ended(self, *numbers: int, limit: float = LIMIT) -> None:
        self.wait(lambda: self.ended(*numbers), "the end", limit)

    def wait(self, condition: Callable[[], object], what: str, limit: float = LIMIT, pause: float = 0.05) -> float:
        """Wait until the condition holds; returns the seconds it took."""
        begun = time.monotonic()
        while not condition():
            seconds = time.monotonic() - begun
            assert seconds < limit, f"not within {limit:g} s: {what}\n{self.printed()}"
            time.sleep(pause)
        return time.monotonic() - begun

    def saving(self) -> bool:
        """Whether a checkpoint is being saved."""
        return any(self.folder.glob("checkpoints/step_*.partial"))

    def starts(self) -> list[int]:
        """First steps of all starts that trained."""
        return [int(first) for first in re.findall(r"steps (\d+)\.\.", self.printed())]

    @staticmethod
    def alive(pids: Iterable[int]) -> list[int]:
        """Those of these processes that still run."""
        running = []
        for pid in pids:
            with suppress(OSError):
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    running.append(pid)
        return running

    def kill(self, pids: Iterable[int], number: int = signal.SIGKILL) -> None:
        """Send a signal to those that still run."""
        for pid in self.alive(pids):
            os.kill(pid, number)
