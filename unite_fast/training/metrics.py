"""What a run tells about itself: sums on the device, then metrics.jsonl and TensorBoard."""

import json
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from unite_fast.errors import writing
from unite_fast.objective import Losses

AVERAGED = ("total", "l1", "lpips", "flow", "grad_norm")


class Averages:
    """Means since the last log, summed on the device: an ordinary step does not wait for it."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(len(AVERAGED), dtype=torch.float64, device=device)
        self.count = 0
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, step: int, losses: Losses, grad_norm: Tensor) -> None:
        values = torch.stack([losses.total.detach(), losses.l1, losses.lpips, losses.flow, grad_norm]).double()
        self.sums += values
        self.count += 1
        bad = (self.first_bad_step < 0) & ~values.isfinite().all()
        self.first_bad_step = torch.where(bad, step, self.first_bad_step)

    def bad_step(self) -> int | None:
        """The first step whose losses or gradients were not finite; waits for the device."""
        step = int(self.first_bad_step)
        return step if step >= 0 else None

    def take(self) -> dict[str, float]:
        """The means, and start anew; waits for the device."""
        means = (self.sums / max(self.count, 1)).tolist()
        self.sums.zero_()
        self.count = 0
        return dict(zip(AVERAGED, means, strict=True))

    def state_dict(self) -> dict:
        return {"sums": self.sums.tolist(), "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self.count = state["count"]


class MetricsLog:
    """metrics.jsonl (one JSON object a line) and TensorBoard events in a run's folder."""

    def __init__(self, folder: Path, step: int):
        """Rows after `step` are dropped: a killed run wrote them after its last checkpoint and writes them again."""
        self.path = folder / "metrics.jsonl"
        self.events_path = folder / "tensorboard"
        self.rows = [row for row in read_rows(self.path) if row["step"] <= step]
        partial = self.path.with_name(self.path.name + ".partial")
        with writing(self.path):
            partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            os.replace(partial, self.path)
        with writing(self.events_path):
            self.events = SummaryWriter(str(self.events_path), purge_step=step + 1)

    def write(self, row: dict) -> None:
        """
        Raises:
            UserError: no space left.
        """
        self.rows.append(row)
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        with writing(self.events_path):
            for name, value in row.items():
                if name != "step":
                    self.events.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        """Let the disk have the events: what a checkpoint counts as done, a killed run must not lose."""
        with writing(self.events_path):
            self.events.flush()

    def close(self) -> None:
        with writing(self.events_path):
            self.events.close()


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that a killed process or a full disk left unfinished is passed over."""
    rows = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "step" in row:
                rows.append(row)
    return rows
