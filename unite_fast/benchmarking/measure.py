"""Times the trainer itself: its step, loader, optimizers, averages and sharding, in a temporary folder.

The device is waited for at both ends of the timed steps only. Between them a mark a step is left in its queue (CUDA
events, or the clock on a CPU), so the steps follow one another as in training.
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

from unite_fast.benchmarking.product_rate import product_rate, synchronize
from unite_fast.benchmarking.progress import ProgressLine
from unite_fast.benchmarking.top_kernels import top_kernels
from unite_fast.config import Config, ProfileConfig
from unite_fast.distributed.launch import join_training
from unite_fast.distributed.peers import Peers
from unite_fast.distributed.process_group import Ranks
from unite_fast.distributed.watchdog import Watchdog, report_lost_contact
from unite_fast.errors import UserError
from unite_fast.lpips import has_weights, random_lpips
from unite_fast.training.trainer import Trainer
from unite_fast.utils.device import choose_device


@dataclass(frozen=True)
class Window:
    """What is timed.

    Attributes:
        warmup: steps before, of which the first compiles.
        steps: timed steps.
        seconds: as many steps as fit into this time, at most `steps` and at least one; 0: `steps`.
        profile: whether the kernels of two more steps are listed.
    """

    warmup: int = 5
    steps: int = 20
    seconds: float = 0.0
    profile: bool = False


@dataclass(frozen=True)
class Measured:
    """
    Attributes:
        ranks: this process among those that took part.
        first_step: seconds of the first step, which compiles.
        whole: seconds of all timed steps together, the slowest process's.
        step_seconds: of each timed step, the slowest process's.
        parts: mean seconds a step by part, as `training.clock.StepClock` has them; the mean of the processes.
        product_rate: FLOP/s of bfloat16 products, the mean of the processes, all at once.
        memory: bytes, the most of any process: of its GPU by tensors, on a CPU of the whole process.
        reserved: bytes of a GPU that PyTorch's allocator took, the most of any process; 0 on a CPU.
        bad_step: the first step whose loss or gradient was not finite.
        strategy: how the processes share the training state.
        top: kernels by time, if they were asked for.
    """

    ranks: Ranks
    device: torch.device
    first_step: float
    whole: float
    step_seconds: list[float]
    parts: dict[str, float]
    product_rate: float
    memory: float
    reserved: float
    bad_step: int | None
    strategy: str
    random_lpips: bool
    top: list[dict] | None


def measure(config: Config, window: Window) -> Measured:
    """Time a recipe, alone or under torchrun; all processes call it together and have the same figures.

    Raises:
        UserError: settings or data that do not fit; `LostContact`, another process died.
    """
    with opened(config) as trainer:
        line = ProgressLine(trainer.ranks.main, config.train.batch_size)
        first_step, seconds = 0.0, 0.0
        for step in range(window.warmup):
            line.show(f"warm-up {step + 1}/{window.warmup}" if step else "first step, which compiles", step)
            synchronize(trainer.device)
            begun = time.perf_counter()
            take_step(trainer)
            synchronize(trainer.device)
            seconds = time.perf_counter() - begun
            first_step = first_step or seconds
        steps = window.steps
        if window.seconds:
            steps = trainer.ranks.broadcast(max(1, min(steps, int(window.seconds / max(seconds, 1e-6)))))
        whole, step_seconds, parts = timed_steps(trainer, steps, line)
        line.show("profiling" if window.profile else "measuring the product rate", steps, force=True)
        top = top_kernels(lambda: take_step(trainer), trainer.device) if window.profile else None
        trainer.watchdog.beat(trainer.state.step, "measuring the product rate", patient=True)
        line.close()
        return gathered(trainer, first_step, whole, step_seconds, parts, top)


def gathered(trainer: Trainer, first_step: float, whole: float, step_seconds: list, parts: dict, top) -> Measured:
    """The figures of all processes as one."""
    cuda, perceptual = trainer.device.type == "cuda", trainer.config.perceptual
    memory, reserved = trainer.speed.memory(), torch.cuda.max_memory_reserved(trainer.device) if cuda else 0
    bad_step = trainer.averages.bad_step()
    everyone = trainer.ranks.gather((first_step, whole, step_seconds, parts, product_rate(trainer.device), reserved))
    firsts, wholes, steps, each_parts, rates, all_reserved = zip(*everyone, strict=True)
    return Measured(
        ranks=trainer.ranks,
        device=trainer.device,
        first_step=max(firsts),
        whole=max(wholes),
        step_seconds=[max(each) for each in zip(*steps, strict=True)],
        parts={name: statistics.fmean(each[name] for each in each_parts) for name in parts},
        product_rate=statistics.fmean(rates),
        memory=memory,
        reserved=max(all_reserved),
        bad_step=bad_step,
        strategy=trainer.strategy.name,
        random_lpips=bool(perceptual.weight) and not has_weights(perceptual),
        top=top,
    )


def timed_steps(trainer: Trainer, count: int, line: ProgressLine) -> tuple[float, list[float], dict[str, float]]:
    """Seconds of `count` steps: together, each, and the mean of each part."""
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
    """One step of `Trainer.run`, without what it does only now and then."""
    with trainer.speed.clock.measure("data"):
        batch = trainer.read()
    losses, grad_norm = trainer.step(batch)
    trainer.averages.add(trainer.state.step, losses, grad_norm)


class Marks:
    """Moments in the device's queue of work; leaving one waits for nothing."""

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
        """Between each mark and the next; the device must have come to the last one."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [one.elapsed_time(other) / 1e3 if self.cuda else other - one for one, other in pairs]


@contextmanager
def opened(config: Config) -> Iterator[Trainer]:
    """A trainer of these settings, whose folder is gone in the end, whatever that is."""
    timeout = config.parallel.timeout
    with (
        sigterm_unwinds(),
        join_training(choose_device(config.train.device).type, timeout) as (ranks, device),
        Watchdog(Peers(ranks.rank, ranks.world), timeout) as watchdog,
        report_lost_contact(watchdog),
        temporary_folder() as folder,
    ):
        perceptual, lpips = config.perceptual, None
        if perceptual.weight and not has_weights(perceptual):
            lpips = random_lpips(perceptual)
        # What it says of itself as a run is not true of this one.
        with redirect_stdout(io.StringIO()):
            trainer = Trainer(for_timing(config, folder), False, ranks, device, watchdog, lpips)
        try:
            yield trainer
        except BaseException:
            with suppress(UserError, RuntimeError):  # the first error says more
                trainer.close()
            raise
        trainer.close()


def for_timing(config: Config, folder: str) -> Config:
    """The settings of a run that leaves nothing behind."""
    silent = {"out": folder, "evaluate_every": 0, "evaluate_epochs": 0.0, "picture_every": 0, "wandb": ""}
    return replace(config, train=replace(config.train, **silent), profile=ProfileConfig())


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Of each process its own: only the main one writes anything."""
    folder = tempfile.mkdtemp(prefix="unite_fast_bench_")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """SIGTERM, with which torchrun and schedulers end a process, tidies up on its way out."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
