"""Time the real trainer, with its step, loader, optimizers, EMA and sharding, in a temporary folder.

The device is synchronised only before and after the timed steps. In between, each step records an event (a CUDA event,
or the clock on a CPU), so the host runs ahead as in training.
"""

import io
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace

import torch

from unite_fast.benchmarking.matmul_rate import matmul_rate, synchronize
from unite_fast.benchmarking.progress import ProgressLine
from unite_fast.benchmarking.top_kernels import top_kernels
from unite_fast.config import Config, ProfileConfig
from unite_fast.distributed.launch import join_training
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError
from unite_fast.lpips import has_weights, random_lpips
from unite_fast.training.setup import start_values
from unite_fast.training.trainer import Trainer
from unite_fast.utils.device import choose_device


@dataclass(frozen=True)
class Window:
    """Which steps to time.

    Attributes:
        warmup: steps before; the first one compiles.
        steps: timed steps.
        seconds: time limit for the timed steps, of which at least one runs; 0: no limit.
        profile: whether to list the kernels of two more steps.
    """

    warmup: int = 5
    steps: int = 20
    seconds: float = 0.0
    profile: bool = False


@dataclass(frozen=True)
class Measurement:
    """Speed and memory of a recipe.

    Attributes:
        first_step: seconds of the first step, which compiles.
        whole: seconds of all timed steps together, on the slowest rank.
        step_seconds: seconds of each timed step, on the slowest rank.
        parts: mean seconds per step by part (see `training.step_timer`), averaged over the ranks.
        matmul_rate: FLOP/s of bfloat16 matmuls on all ranks at once, averaged over the ranks.
        memory: peak bytes, maximum over the ranks: of tensors on a GPU, of the process on a CPU.
        reserved: bytes that PyTorch's allocator reserved on a GPU, maximum over the ranks; 0 on a CPU.
        bad_step: the first step whose loss or gradient was not finite.
        strategy: how the training state is replicated or sharded.
        random_lpips: whether LPIPS had random weights.
        top: kernels by time, if requested.
    """

    ranks: Ranks
    device: torch.device
    first_step: float
    whole: float
    step_seconds: list[float]
    parts: dict[str, float]
    matmul_rate: float
    memory: float
    reserved: float
    bad_step: int | None
    strategy: str
    random_lpips: bool
    top: list[dict] | None


def measure(config: Config, window: Window) -> Measurement:
    """Time a recipe, in one process or under torchrun. Collective: all ranks return the same figures.

    Raises:
        UserError: settings or data do not fit; `LostContact`: another process died.
    """
    with open_trainer(config) as trainer:
        line = ProgressLine(trainer.ranks.main, config.train.batch_size, f"{config.model.modality}/s")
        first_step, seconds = 0.0, 0.0
        for step in range(window.warmup):
            line.show(f"warm-up {step + 1}/{window.warmup}" if step else "first step, which compiles", step)
            synchronize(trainer.device)
            start = time.perf_counter()
            take_step(trainer)
            synchronize(trainer.device)
            seconds = time.perf_counter() - start
            first_step = first_step or seconds
        steps = window.steps
        if window.seconds:
            steps = trainer.ranks.broadcast(max(1, min(steps, int(window.seconds / max(seconds, 1e-6)))))
        whole, step_seconds, parts = timed_steps(trainer, steps, line)
        line.show("profiling" if window.profile else "measuring the matmul rate", steps, force=True)
        top = top_kernels(lambda: take_step(trainer), trainer.device) if window.profile else None
        trainer.watchdog.beat(trainer.state.step, "measuring the matmul rate", patient=True)
        line.close()
        return gather_measurement(trainer, first_step, whole, step_seconds, parts, top)


def gather_measurement(
    trainer: Trainer, first_step: float, whole: float, step_seconds: list, parts: dict, top
) -> Measurement:
    """Combine the figures of all ranks."""
    cuda, perceptual = trainer.device.type == "cuda", trainer.config.perceptual
    memory, reserved = trainer.speed.memory(), torch.cuda.max_memory_reserved(trainer.device) if cuda else 0
    bad_step = trainer.averages.bad_step()
    per_rank = trainer.ranks.gather((first_step, whole, step_seconds, parts, matmul_rate(trainer.device), reserved))
    firsts, wholes, steps, each_parts, rates, all_reserved = zip(*per_rank, strict=True)
    return Measurement(
        ranks=trainer.ranks,
        device=trainer.device,
        first_step=max(firsts),
        whole=max(wholes),
        step_seconds=[max(each) for each in zip(*steps, strict=True)],
        parts={name: statistics.fmean(each[name] for each in each_parts) for name in parts},
        matmul_rate=statistics.fmean(rates),
        memory=memory,
        reserved=max(all_reserved),
        bad_step=bad_step,
        strategy=trainer.strategy.name,
        random_lpips=bool(perceptual.weight) and not has_weights(perceptual),
        top=top,
    )


def timed_steps(trainer: Trainer, count: int, line: ProgressLine) -> tuple[float, list[float], dict[str, float]]:
    """Time `count` steps: total seconds, seconds per step, and mean seconds by part."""
    marks = Marks(trainer.device)
    line.start()
    synchronize(trainer.device)
    trainer.ranks.wait()
    trainer.speed.clock.start()
    marks.add()
    for step in range(count):
        take_step(trainer)
        marks.add()
        line.show(f"step {step + 1}/{count}", step + 1, left=count - step - 1)
    synchronize(trainer.device)
    whole, parts = trainer.speed.clock.take()
    return whole, marks.seconds(), {name: seconds / count for name, seconds in parts.items()}


def take_step(trainer: Trainer) -> None:
    """One step of `Trainer.run`, without logging, checkpoints and evaluation."""
    with trainer.speed.clock.measure("data"):
        batch = trainer.read()
    losses, grad_norm = trainer.step(batch)
    trainer.averages.add(trainer.state.step, losses, grad_norm)


class Marks:
    """Time stamps in the device's queue; adding one does not synchronise."""

    def __init__(self, device: torch.device):
        self.cuda, self.marks = device.type == "cuda", []

    def add(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds between consecutive marks; the device must have reached the last one."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [one.elapsed_time(other) / 1e3 if self.cuda else other - one for one, other in pairs]


@contextmanager
def open_trainer(config: Config) -> Iterator[Trainer]:
    """A trainer with these settings in a temporary folder, which is deleted in any case."""
    device, timeout = choose_device(config.train.device), config.parallel.timeout
    with (
        sigterm_unwinds(),
        join_training(device.type, timeout, start_values(config, {})) as (ranks, device, watchdog),
        temporary_folder() as folder,
    ):
        perceptual, lpips = config.perceptual, None
        if perceptual.weight and not has_weights(perceptual):
            lpips = random_lpips(perceptual)
        # Silence the trainer: its messages describe a training run, not a benchmark.
        with redirect_stdout(io.StringIO()):
            trainer = Trainer(for_timing(config, folder), False, ranks, device, watchdog, lpips)
        try:
            yield trainer
        except BaseException:
            with suppress(UserError, RuntimeError):  # the first error matters
                trainer.close()
            raise
        trainer.close()


def for_timing(config: Config, folder: str) -> Config:
    """The config without evaluation, logging and sample images."""
    silent = {"out": folder, "evaluate_every": 0, "evaluate_epochs": 0.0, "picture_every": 0, "wandb": ""}
    return replace(config, train=replace(config.train, **silent), profile=ProfileConfig())


@contextmanager
def temporary_folder() -> Iterator[str]:
    """One per rank; only rank 0 writes to it."""
    folder = tempfile.mkdtemp(prefix="unite_fast_bench_")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Raise SystemExit on SIGTERM, by which torchrun and schedulers end a process, so that cleanup runs."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
