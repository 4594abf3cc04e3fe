"""Metrics of a run: averages on the device, speed, and their log (metrics.jsonl, TensorBoard, Weights & Biases)."""

import json
import math
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.utils.tensorboard import SummaryWriter

from unite_fast.config import IMAGES, MOLECULES, Config
from unite_fast.distributed.hosts import known_hosts, name_ranks
from unite_fast.distributed.process_group import current_ranks
from unite_fast.errors import require
from unite_fast.objective import Losses
from unite_fast.planning.flops import image_flops
from unite_fast.planning.gpus import recognise
from unite_fast.training.side_outputs import SideOutputs
from unite_fast.training.step_timer import StepClock
from unite_fast.training.wandb_log import WandbLog
from unite_fast.utils.files import make_folder, open_to_append
from unite_fast.utils.rows import drop_rows_after, own_file, read_rows, set_aside, thin_rows

AVERAGED = {
    IMAGES: ("total", "l1", "lpips", "flow", "grad_norm", "latent_square"),
    MOLECULES: ("total", "l1", "cross_entropy", "flow", "grad_norm", "latent_square"),
}
"""Fields of `Losses`, and the norm of the gradient, by modality."""
HARDWARE = ("images_per_s", "images_per_s_per_gpu", "mfu", "memory_gb", "seconds_", "slowest_")
"""Prefixes of metrics that describe the hardware, not the training."""
NEVER = 2**62
"""A step number that no run reaches."""
STRAGGLER_RATIO = 1.3
"""Seconds of the slowest rank over the median, from which the console names it."""
SPIKE_DEVIATIONS = 6.0
SPIKE_ROWS = 20
SPIKE_MIN_ROWS = 10
"""A loss is a spike if it exceeds the mean of the 20 rows before it by more than 6 standard deviations of these rows.
Needs at least 10 of them."""


class Averages:
    """Means since the last log. Sums stay on the device, so an ordinary step does not wait for it. A step whose values
    are not finite is left out; the gradient norm is the same on all ranks, so all leave it out.

    Each rank sums its own slice of the batch. `bad_step`, `take` and `state_dict` communicate: all ranks call them
    together.
    """

    def __init__(self, device: torch.device, modality: str = IMAGES):
        self.names = AVERAGED[modality]
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad_step = torch.full((), NEVER, dtype=torch.int64, device=device)

    def add(self, step: int, losses: Losses, grad_norm: Tensor) -> None:
        values = [grad_norm if name == "grad_norm" else getattr(losses, name).detach() for name in self.names]
        values = torch.stack(values).double()
        finite = values.isfinite().all()
        self.sums += torch.where(finite, values, 0.0)
        self.count += finite
        bad = (self.first_bad_step == NEVER) & ~finite
        self.first_bad_step = torch.where(bad, step, self.first_bad_step)

    def bad_step(self) -> int | None:
        """The first step whose losses or gradients were not finite on any rank, or None. Waits for the device."""
        if current_ranks().world > 1:
            distributed.all_reduce(self.first_bad_step, distributed.ReduceOp.MIN)
        step = int(self.first_bad_step)
        return step if step < NEVER else None

    def take(self) -> dict[str, float]:
        """Means over steps and ranks (nan if no step was finite), then reset. Waits for the device."""
        self._average_over_ranks()
        means = (self.sums / self.count).tolist()
        self.sums.zero_()
        self.count.zero_()
        return dict(zip(self.names, means, strict=True))

    def state_dict(self) -> dict:
        """The same on all ranks, so that a run can resume with another world size."""
        self._average_over_ranks()
        return {"sums": self.sums.tolist(), "count": int(self.count)}

    def load_state_dict(self, state: dict) -> None:
        """
        Raises:
            UserError: `state` has other averages.
        """
        found, expected = len(state["sums"]), len(self.names)
        if found == expected - 1:
            return  # of a version without latent_square: the next row is of the steps from here on
        require(found == expected, f"cannot resume: the checkpoint has sums of {found} averages, not of {expected}")
        self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self.count.fill_(state["count"])

    def _average_over_ranks(self) -> None:
        """Replace the sums by their mean over ranks. A run that continues then has the same bits as one that
        resumes."""
        ranks = current_ranks()
        ranks.sum(self.sums)
        self.sums /= ranks.world


class Speedometer:
    """The hardware metrics of a row.

    Attributes:
        clock: measures the parts of a step.
        mfu_note: a line about MFU: the peak it refers to, or why there is none.
    """

    def __init__(self, config: Config, device: torch.device):
        self.device = device
        self.batch_size = config.train.batch_size
        self.image_flops = image_flops(config)
        self.clock = StepClock(device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        gpu = recognise(name)
        self.peak = gpu.tflops * 1e12 if gpu else None
        self.mfu_note = f"MFU: {self.image_flops / 1e9:.4g} GFLOP per {config.model.sample_name}, "
        if gpu:
            self.mfu_note += f"relative to {gpu.tflops:g} dense bfloat16 TFLOP/s of {name} ({gpu.source})"
        else:
            self.mfu_note += f"not shown: no peak of {name} is known (unite_fast/planning/gpus.py)"

    def row(self, steps: int) -> dict[str, float | str]:
        """Metrics of the `steps` steps since the last row: images per second, mean seconds per step by part, memory in
        GB. Waits for the device; all ranks call this together."""
        seconds, parts = self.clock.take()
        rate = steps * self.batch_size / seconds
        row = {"images_per_s": rate, "images_per_s_per_gpu": rate / current_ranks().world}
        if self.peak:
            row["mfu"] = row["images_per_s_per_gpu"] * self.image_flops / self.peak
        row |= {f"seconds_{part}": total / steps for part, total in parts.items()}
        row |= self.slowest((parts["data"] + parts["forward"]) / steps)
        return row | {"memory_gb": self.memory() / 1e9}

    def slowest(self, own: float) -> dict[str, int | float | str]:
        """The slowest rank, its machine, and its time over the median. Empty for a process alone. All ranks call this
        together.

        Args:
            own: mean seconds of reading and forward pass here. In the rest of a step each rank waits for the others.
        """
        ranks = current_ranks()
        if ranks.world == 1:
            return {}
        seconds = torch.zeros(ranks.world, dtype=torch.float64, device=self.device)
        seconds[ranks.rank] = own
        distributed.all_reduce(seconds)
        rank, median = int(seconds.argmax()), statistics.median(seconds.tolist())
        found: dict[str, int | float | str] = {
            "slowest_rank": rank,
            "slowest_ratio": float(seconds[rank]) / max(median, 1e-9),
        }
        return found | ({"slowest_host": hosts[rank]} if (hosts := known_hosts()) else {})

    def memory(self) -> float:
        """Peak memory of any rank, bytes: tensors on its GPU, or the whole process on a CPU."""
        if self.device.type == "cuda":
            most = torch.cuda.max_memory_allocated(self.device)
        else:
            # In kilobytes on Linux, bytes on macOS.
            unit = 1 if sys.platform == "darwin" else 1024
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if current_ranks().world > 1:
            peak = torch.tensor(float(most), dtype=torch.float64, device=self.device)
            distributed.all_reduce(peak, distributed.ReduceOp.MAX)
            most = peak.item()
        return most


def training_metrics(row: dict) -> dict:
    """The metrics of a row without the hardware's: two runs of one recipe have the same, bit by bit."""
    return {name: value for name, value in row.items() if not name.startswith(HARDWARE)}


def straggler(row: dict) -> str:
    """For a row's line on the console: the slowest rank, if it is much slower than the median; else empty."""
    if row.get("slowest_ratio", 0) < STRAGGLER_RATIO:
        return ""
    return f"  slowest: {name_ranks([row['slowest_rank']])}, {row['slowest_ratio']:.1f} x the median"


def loss_spike(rows: Sequence[dict]) -> str | None:
    """A warning if the last row's loss is far above those before it (see `SPIKE_DEVIATIONS`), or None."""
    if len(rows) <= SPIKE_MIN_ROWS:
        return None
    *before, last = rows[-SPIKE_ROWS - 1 :]
    values = (row.get("total") for row in before)
    totals = [value for value in values if isinstance(value, float) and math.isfinite(value)]
    if len(totals) < SPIKE_MIN_ROWS:
        return None
    mean, deviation = statistics.fmean(totals), statistics.stdev(totals)
    if not last["total"] > mean + SPIKE_DEVIATIONS * deviation:
        return None
    return (
        f"loss spike: {last['total']:.4f} in the row of step {last['step']}; the {len(before)} rows before have mean "
        f"{mean:.4f}, standard deviation {deviation:.4f}"
    )


def _finite(row: dict) -> dict:
    """The row without NaN and infinity, which JSON cannot express. If all steps were skipped, the means are NaN."""
    return {name: value for name, value in row.items() if not isinstance(value, float) or math.isfinite(value)}


class MetricsLog:
    """metrics.jsonl (one JSON object per line) and TensorBoard events in a run folder, and Weights & Biases if `wandb`
    is given. Only rank 0 has one. A failure is a warning: see `SideOutputs`.

    Attributes:
        rows: for curves and the search for spikes: those of the file, or some of them (see `thin_rows`).
    """

    def __init__(self, folder: Path, step: int, wandb: WandbLog | None = None, sides: SideOutputs | None = None):
        """Rows after `step` are dropped: a run that was killed after its last checkpoint writes them again."""
        self.wandb, self.sides = wandb, sides or SideOutputs()
        self.rows: list[dict] = []
        self.events: SummaryWriter | None = None
        self.purge_step = step + 1
        self.use(folder)
        with self.sides.attempt("metrics.jsonl"):
            own_file(self.path)
            if not step and (old := set_aside(self.path)):
                self.sides.warn(f"{self.path} of an earlier run is now {old.name}")
            drop_rows_after(self.path, step)
            self.rows = thin_rows(read_rows(self.path))
        self._open_events()

    def use(self, folder: Path) -> None:
        """Write to this folder from now on: the run folder was moved."""
        self.path, self.events_path = folder / "metrics.jsonl", folder / "tensorboard"

    def write(self, row: dict) -> None:
        self.rows.append(row)
        self.rows = thin_rows(self.rows)
        with self.sides.attempt("metrics.jsonl"), open_to_append(self.path) as file:
            # One write, so that a reader or a full disk cuts at most one row.
            file.write((json.dumps(_finite(row)) + "\n").encode())
        for name, value in row.items():
            if name != "step" and not isinstance(value, str):
                self.write_scalar(name, value, row["step"])
        if self.wandb:
            with self.sides.attempt("Weights & Biases"):
                self.wandb.write(row)

    def write_scalar(self, name: str, value: float, step: int) -> None:
        """Add a point to a curve on TensorBoard."""
        self.purge_step = step + 1
        if self.events is not None:
            self._on_events(lambda events: events.add_scalar(name, value, step))

    def flush(self) -> None:
        """Write out buffered events, before a checkpoint that counts their steps as done. After a failure, try a new
        file."""
        if self.events is None or not self.events_path.is_dir():
            self._open_events()
        if self.events is not None:
            self._on_events(SummaryWriter.flush)

    def close(self) -> None:
        if self.wandb:
            with self.sides.attempt("Weights & Biases"):
                self.wandb.close()
        if self.events is not None:
            self._on_events(SummaryWriter.close)

    def _on_events(self, call: Callable[[SummaryWriter], None]) -> None:
        events, self.events = self.events, None
        with self.sides.attempt("TensorBoard"):
            assert events is not None  # the callers check
            call(events)
            self.events = events

    def _open_events(self) -> None:
        with self.sides.attempt("TensorBoard"):
            make_folder(self.events_path)
            self.events = SummaryWriter(str(self.events_path), purge_step=self.purge_step)
