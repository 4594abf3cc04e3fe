"""What a run tells about itself: sums on the device, speed, then metrics.jsonl, TensorBoard and Weights & Biases."""

import json
import math
import resource
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.utils.tensorboard import SummaryWriter

from unite_fast.config import Config
from unite_fast.distributed.process_group import current_ranks
from unite_fast.objective import Losses
from unite_fast.planning.flops import image_flops
from unite_fast.planning.gpus import recognise
from unite_fast.training.step_timer import StepClock
from unite_fast.training.wandb_log import WandbLog
from unite_fast.utils.files import atomic_write, read_rows, writing

AVERAGED = ("total", "l1", "lpips", "flow", "grad_norm")
MACHINE = ("images_per_s", "images_per_s_per_gpu", "mfu", "memory_gb", "seconds_")
"""What the names of those numbers of a row begin with that tell of the machine and not of the training."""
NEVER = 2**62
SPIKE_DEVIATIONS = 6.0
SPIKE_ROWS = 20
SPIKE_LEAST_ROWS = 10
"""A row's loss is a spike if it is above the mean of the 20 rows before it by more than 6 of their standard deviations,
once there are 10 of them."""


class Averages:
    """Means since the last log, summed on the device: an ordinary step does not wait for it. A step that is not finite
    on this process is left out; the norm of the gradients, which all share, makes it so on all.

    Of several processes, each sums its own part of the batch. `bad_step`, `take` and `state_dict` send: all processes
    must call them together.
    """

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(len(AVERAGED), dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad_step = torch.full((), NEVER, dtype=torch.int64, device=device)

    def add(self, step: int, losses: Losses, grad_norm: Tensor) -> None:
        values = torch.stack([losses.total.detach(), losses.l1, losses.lpips, losses.flow, grad_norm]).double()
        finite = values.isfinite().all()
        self.sums += torch.where(finite, values, 0.0)
        self.count += finite
        bad = (self.first_bad_step == NEVER) & ~finite
        self.first_bad_step = torch.where(bad, step, self.first_bad_step)

    def bad_step(self) -> int | None:
        """The first step whose losses or gradients were not finite, on any process; waits for the device."""
        if current_ranks().world > 1:
            distributed.all_reduce(self.first_bad_step, distributed.ReduceOp.MIN)
        step = int(self.first_bad_step)
        return step if step < NEVER else None

    def take(self) -> dict[str, float]:
        """The means over steps and processes, nan if no step was finite, and start anew; waits for the device."""
        self._share()
        means = (self.sums / self.count).tolist()
        self.sums.zero_()
        self.count.zero_()
        return dict(zip(AVERAGED, means, strict=True))

    def state_dict(self) -> dict:
        """The same on all processes, so that any number of them can go on from it."""
        self._share()
        return {"sums": self.sums.tolist(), "count": int(self.count)}

    def load_state_dict(self, state: dict) -> None:
        self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self.count.fill_(state["count"])

    def _share(self) -> None:
        """Give each process the mean of all sums. A run that goes on has then the same bits as one that resumes."""
        if current_ranks().world > 1:
            distributed.all_reduce(self.sums)
            self.sums /= current_ranks().world


class Speedometer:
    """The numbers of a row that tell of the machine.

    Attributes:
        clock: to be told what each part of a step is.
        about: what to say once of MFU: what it is a share of, or why there is none.
    """

    def __init__(self, config: Config, device: torch.device):
        self.device = device
        self.batch_size = config.train.batch_size
        self.image_flops = image_flops(config)
        self.clock = StepClock(device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        gpu = recognise(name)
        self.peak = gpu.tflops * 1e12 if gpu else None
        self.about = f"MFU: {self.image_flops / 1e9:.4g} GFLOP an image, "
        if gpu:
            self.about += f"as a share of {gpu.tflops:g} dense bfloat16 TFLOP/s of {name} ({gpu.source})"
        else:
            self.about += f"not told: no peak of {name} is known (unite_fast/planning/gpus.py)"

    def row(self, steps: int) -> dict[str, float]:
        """Of `steps` steps since the last row: rates, mean seconds a step by part, memory. Waits for the device; all
        processes must call it together."""
        seconds, parts = self.clock.take()
        rate = steps * self.batch_size / seconds
        row = {"images_per_s": rate, "images_per_s_per_gpu": rate / current_ranks().world}
        if self.peak:
            row["mfu"] = row["images_per_s_per_gpu"] * self.image_flops / self.peak
        row |= {f"seconds_{part}": spent / steps for part, spent in parts.items()}
        return row | {"memory_gb": self.memory() / 1e9}

    def memory(self) -> float:
        """Bytes, the most that any process has used: of its GPU by tensors, else of memory by the whole process."""
        if self.device.type == "cuda":
            most = torch.cuda.max_memory_allocated(self.device)
        else:
            # Kilobytes, but bytes on macOS.
            unit = 1 if sys.platform == "darwin" else 1024
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if current_ranks().world > 1:
            shared = torch.tensor(float(most), dtype=torch.float64, device=self.device)
            distributed.all_reduce(shared, distributed.ReduceOp.MAX)
            most = shared.item()
        return most


def of_training(row: dict) -> dict:
    """The numbers of a row that two runs of one recipe share to the last bit."""
    return {name: value for name, value in row.items() if not name.startswith(MACHINE)}


def loss_spike(rows: Sequence[dict]) -> str | None:
    """A line about the last row if its loss is far above those before it (see `SPIKE_DEVIATIONS`)."""
    if len(rows) <= SPIKE_LEAST_ROWS:
        return None
    *before, last = rows[-SPIKE_ROWS - 1 :]
    totals = [row["total"] for row in before if math.isfinite(row["total"])]
    if len(totals) < SPIKE_LEAST_ROWS:
        return None
    mean, deviation = statistics.fmean(totals), statistics.stdev(totals)
    if not last["total"] > mean + SPIKE_DEVIATIONS * deviation:
        return None
    return (
        f"loss spike: {last['total']:.4f} in the steps up to {last['step']}; the {len(before)} rows before have "
        f"{mean:.4f} with deviation {deviation:.4f}"
    )


class MetricsLog:
    """metrics.jsonl (one JSON object a line) and TensorBoard events in a run's folder, and Weights & Biases if
    `wandb` is given. One process of a run has one."""

    def __init__(self, folder: Path, step: int, wandb: WandbLog | None = None):
        """Rows after `step` are dropped: a killed run wrote them after its last checkpoint and writes them again."""
        self.wandb = wandb
        self.path = folder / "metrics.jsonl"
        self.events_path = folder / "tensorboard"
        self.rows = [row for row in read_rows(self.path) if row["step"] <= step]
        with atomic_write(self.path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
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
        if self.wandb:
            self.wandb.write(row)

    def flush(self) -> None:
        """Let the disk have the events: what a checkpoint counts as done, a killed run must not lose."""
        with writing(self.events_path):
            self.events.flush()

    def close(self) -> None:
        if self.wandb:
            self.wandb.close()
        with writing(self.events_path):
            self.events.close()
