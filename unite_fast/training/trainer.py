"""The training loop and what surrounds it: a run's folder, resuming, stopping."""

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unite_fast.checkpoint.format import step_folders, step_of
from unite_fast.checkpoint.manager import Checkpoints
from unite_fast.checkpoint.reader import Checkpoint
from unite_fast.config import Config
from unite_fast.data_pipeline import Batch, Loader, Source, choose_loader, open_source
from unite_fast.distributed.launch import join_training
from unite_fast.distributed.peers import Peers
from unite_fast.distributed.process_group import ALONE, Ranks
from unite_fast.distributed.signals import StopVote, stop_on_signals
from unite_fast.distributed.strategy import split_batch
from unite_fast.distributed.watchdog import Watchdog, report_lost_contact
from unite_fast.errors import UserError, require
from unite_fast.kernels import backend
from unite_fast.lpips import LPIPS, load_lpips
from unite_fast.objective import Losses
from unite_fast.training.console import Report
from unite_fast.training.metrics import Averages, MetricsLog, Speedometer, loss_spike
from unite_fast.training.parallelize import build_model
from unite_fast.training.profiling import StepProfiler
from unite_fast.training.run_folder import ended, find_start, hold, restarted, running, write_config, write_status
from unite_fast.training.train_state import TrainState
from unite_fast.training.train_step import TrainStep, autocast
from unite_fast.training.validation import DuringTraining
from unite_fast.training.wandb_log import WandbLog
from unite_fast.utils.device import choose_device, use_numerics, use_threads
from unite_fast.utils.file_lock import LOCK


@dataclass
class Outcome:
    """How a run ended."""

    folder: Path
    steps: int
    stopped_by: int
    """The signal that ended it early; 0: none did."""
    seconds: float
    images_per_s: float


def train(config: Config, resume: bool = False) -> Outcome:
    """Train a recipe in its run folder.

    Raises:
        UserError: a folder that holds a run already, settings that do not fit data or checkpoint, a loss that is not
            finite, a full disk; `LostContact`, another process died.
    """
    timeout = config.parallel.timeout
    with (
        join_training(choose_device(config.train.device).type, timeout) as (ranks, device),
        Watchdog(Peers(ranks.rank, ranks.world), timeout) as watchdog,
        report_lost_contact(watchdog),
    ):
        trainer = Trainer(config, resume, ranks, device, watchdog)
        try:
            outcome = trainer.run()
        except BaseException:
            # On a full disk, or without the other processes, closing fails too, and the first error says more.
            with suppress(UserError, RuntimeError):
                trainer.close()
            raise
        trainer.close()
    return outcome


class Trainer:
    def __init__(
        self,
        config: Config,
        resume: bool,
        ranks: Ranks = ALONE,
        device: torch.device | None = None,
        watchdog: Watchdog | None = None,
        lpips: LPIPS | None = None,
    ):
        """`lpips`: instead of the one whose weights `perceptual` names."""
        self.config, self.ranks = config, ranks
        self.watchdog = watchdog or Watchdog(Peers(ranks.rank, ranks.world), config.parallel.timeout)
        self.peers = self.watchdog.peers
        self.folder = Path(config.train.out or f"runs/{config.name}")
        self.device = device or choose_device(config.train.device)
        use_threads(config.train.threads)
        use_numerics(config.train.precision, config.train.deterministic)
        backend.use(config.kernels)
        heads = {part.width // part.heads for part in (config.model.encoder, config.model.decoder)}
        backend.use_attention(config.attention, self.device, getattr(torch, config.train.precision), heads)
        self.source = open_source(
            config.data.source, config.data.path, config.model.image_size, "train", config.model.num_classes
        )
        check_data(self.source, config)
        places, micro_batch = split_batch(ranks, config.train.batch_size, config.train.micro_batch)
        if config.perceptual.weight:
            lpips = (lpips or load_lpips(config.perceptual)).to(self.device)

        resume = resume or restarted(self.folder, self.peers)
        # Before anything is read, if another process may train here: its checkpoints come and go meanwhile.
        self.lock = hold(self.folder) if resume and ranks.main and (self.folder / LOCK).exists() else None
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.train.keep_every)
        found = find_start(self.checkpoints, self.folder, config, resume)
        model, self.strategy = build_model(config, ranks, self.device)
        self.state = TrainState(model, config)
        self.averages = Averages(self.device)
        self.choice = choose_loader(config.data.loader, self.source, self.device)
        self.loader = Loader(
            self.source,
            config.train.batch_size,
            config.seed,
            config.data.workers,
            rank=ranks.rank,
            world=ranks.world,
            reader=self.choice.reader,
        )
        if found:
            self.restore(found)
        self.first_step = self.state.step
        self.report = Report(self.folder, config, self.device, self.state, found is not None, ranks.main)
        self.report.say(f"data: {len(self.source)} images, {self.choice.name} loader ({self.choice.why})")
        self.evaluation = DuringTraining(config, self.folder, self.device, self.state.step, len(self.source))
        if self.evaluation.warning:
            self.report.say(f"evaluation: {self.evaluation.warning}")
        if ranks.world > 1:
            each = config.train.batch_size // ranks.world
            self.report.say(f"{ranks.world} processes of {each} images: {self.strategy.name}; {self.strategy.why}")
        wandb = WandbLog(config, self.folder) if config.train.wandb and ranks.main else None
        # Only now, so that a mistake found above leaves no folder that counts as a run; in no process.
        ranks.wait()
        self.log = self.profiler = None
        if ranks.main:
            self.lock = self.lock or hold(self.folder)
            write_config(self.folder, config)
            write_status(self.folder, running())
            self.log = MetricsLog(self.folder, self.state.step, wandb)
            self.profiler = StepProfiler(config.profile, self.folder, self.device, self.report.say)
        self.speed = Speedometer(config, self.device)
        self.train_step = TrainStep(
            self.state, config, places, micro_batch, lpips, self.strategy, self.speed.clock, self.computing
        )
        self.report.say(self.speed.about)

    def restore(self, found: Checkpoint) -> None:
        before = found.progress.get("decoder", self.choice.decoder)
        require(
            before == self.choice.decoder,
            f"cannot resume: {before} decoded the run's images, {self.choice.decoder} would now, and their pixels "
            f"differ; set data.loader={'dali' if before == 'dali' else 'webdataset'}",
        )
        self.checkpoints.load_into(found, self.state.tensors())
        self.state.resume_at(found.step)
        try:
            self.averages.load_state_dict(found.progress["averages"])
            self.loader.load_state_dict(found.progress["loader"])
            self.state.skipped_steps.fill_(found.progress["skipped_steps"])
        except KeyError as error:
            raise UserError(f"cannot resume from {found.path}: it lacks {error}") from error

    def run(self) -> Outcome:
        config, state = self.config.train, self.state
        begun = time.perf_counter()
        self.logged_step, stopped_by = self.first_step, 0
        self.speed.clock.start()
        # `report_lost_contact` within: torchrun sends the survivors SIGTERM while they find out who is missing.
        with stop_on_signals(self.peers) as stop, report_lost_contact(self.watchdog), self.report.progress_bar():
            while state.step < config.steps and not (stopped_by := self.stopped(stop)):
                if self.profiler:
                    self.profiler.before(state.step + 1)
                with self.speed.clock.part("data"):
                    batch = self.read()
                losses, grad_norm = self.step(batch)
                if self.profiler:
                    self.profiler.after(state.step)
                self.averages.add(state.step, losses, grad_norm)
                if state.step % config.log_every == 0:
                    self.write_metrics()
                # Before the checkpoint, so that none counts a step as done whose evaluation a killed run still owes.
                if self.evaluation.due(state.step):
                    self.watchdog.beat(state.step, "evaluating", patient=True)
                    self.report.say(self.evaluation.run(state, self.log))
                if state.step % config.checkpoint_every == 0:
                    self.save()
                if config.picture_every and state.step % config.picture_every == 0:
                    self.save_pictures()
                self.report.advance()
            if state.step % config.checkpoint_every or state.step == self.first_step:
                self.save()
            self.checkpoints.wait()
        seconds = time.perf_counter() - begun
        if not stopped_by and not (config.picture_every and state.step % config.picture_every == 0):
            self.save_pictures()
        speed = (state.step - self.first_step) * config.batch_size / seconds
        outcome = Outcome(self.folder, state.step, stopped_by, seconds, speed)
        if self.ranks.main:
            write_status(self.folder, ended(outcome.steps, outcome.stopped_by))
        self.report.summary(outcome, dict(self.broken_samples()))
        return outcome

    def stopped(self, stop_vote: StopVote) -> int:
        """The signal for which all processes stop now; 0: they go on."""
        self.watchdog.beat(self.state.step + 1, "waiting for the other processes")
        return stop_vote.next_result()

    def read(self) -> Batch:
        self.watchdog.beat(self.state.step + 1, "reading images")
        return next(self.loader)

    def step(self, batch: Batch) -> tuple[Losses, Tensor]:
        """One optimizer step; see `TrainStep`."""
        return self.train_step(batch)

    def computing(self) -> None:
        # The first step compiles.
        self.watchdog.beat(self.state.step + 1, "computing", patient=self.state.step == self.first_step)

    def save_pictures(self) -> None:
        """All processes draw them together, since each may hold a part of the weights; the main one writes."""
        self.watchdog.beat(self.state.step, "drawing pictures", patient=True)
        # Sharded weights are gathered in the precision of training, and so must be what they meet.
        with autocast(self.device, self.config.train.precision):
            self.report.save_pictures(self.log.rows if self.log else [])

    def write_metrics(self) -> None:
        self.watchdog.beat(self.state.step, "writing metrics")
        self.check_finite()
        means, speed = self.averages.take(), self.speed.row(self.state.step - self.logged_step)
        self.logged_step = self.state.step
        if not self.ranks.main:
            return
        row = {
            "step": self.state.step,
            "epoch": self.state.step * self.config.train.batch_size / len(self.source),
            **means,
            "lr": self.state.last_learning_rate,
            "skipped_steps": int(self.state.skipped_steps),
            **speed,
        }
        skipped = row["skipped_steps"] - (self.log.rows[-1]["skipped_steps"] if self.log.rows else 0)
        if skipped:
            self.report.say(f"{skipped} of the last steps left out: gradients not finite (optim.nonfinite=skip)")
        self.log.write(row)
        self.report.show(row)
        if spike := loss_spike(self.log.rows):
            self.report.say(spike)

    def save(self) -> None:
        self.watchdog.beat(self.state.step, "saving a checkpoint", patient=True)
        self.check_finite()
        progress = {
            "averages": self.averages.state_dict(),
            "loader": {**self.loader.state_dict(), "skipped": self.broken_samples()},
            "decoder": self.choice.decoder,
            "skipped_steps": int(self.state.skipped_steps),
        }
        tensors = self.state.tensors()
        # A loss of this step can be finite although its update was not.
        if not self.checkpoints.all_finite(tensors):
            raise UserError(f"the weights after step {self.state.step} are not finite; {self.last_good()}")
        if self.log:
            self.log.flush()
        self.checkpoints.save(self.state.step, self.config, progress, tensors)

    def broken_samples(self) -> list[list[str]]:
        """Name and reason of each that was met so far: a process meets only those of its own places."""
        met = {name: reason for skipped in self.ranks.gather(self.loader.skipped) for name, reason in skipped.items()}
        return [list(item) for item in met.items()]

    def check_finite(self) -> None:
        if self.config.optim.nonfinite == "skip":
            return
        bad = self.averages.bad_step()
        if bad is not None:
            raise UserError(f"the loss or gradient of step {bad} is not finite; {self.last_good()}")

    def last_good(self) -> str:
        with suppress(UserError):  # what is being written may yet become the last good one
            self.checkpoints.wait()
        saved = [path for path in step_folders(self.checkpoints.folder) if step_of(path) < self.state.step]
        return f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved before it"

    def close(self) -> None:
        try:
            self.checkpoints.close()
        finally:
            self.loader.close()
            if self.profiler:
                self.profiler.close()
            if self.log:
                self.log.close()
            if self.lock:
                self.lock.close()


def check_data(source: Source, config: Config) -> None:
    classes = len(source.class_names)
    require(
        classes == config.model.num_classes,
        f"the data have {classes} classes, but model.num_classes is {config.model.num_classes}",
    )
