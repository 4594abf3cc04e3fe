"""The training loop: start or resume, steps, logging, checkpoints, pictures, stop."""

import math
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unite_fast.checkpoint.folders import step_folders, step_of
from unite_fast.checkpoint.manager import Checkpoints
from unite_fast.checkpoint.reader import Checkpoint
from unite_fast.config import MOLECULES, Config
from unite_fast.data_pipeline import Batch, Loader, choose_loader
from unite_fast.distributed.dtensor import full_tensor
from unite_fast.distributed.launch import join_training
from unite_fast.distributed.peers import Peers
from unite_fast.distributed.process_group import ALONE, Ranks
from unite_fast.distributed.signals import StopVote, TorchrunEnded, stop_on_signals
from unite_fast.distributed.strategy import split_batch
from unite_fast.distributed.watchdog import Watchdog, report_lost_contact
from unite_fast.errors import TemporaryError, UserError, require
from unite_fast.kernels import backend
from unite_fast.lpips import LPIPS, load_lpips
from unite_fast.objective import Losses
from unite_fast.training import flight_recorder
from unite_fast.training.checkpoint_schedule import CheckpointSchedule
from unite_fast.training.console import Report
from unite_fast.training.data_record import CHANGES, KEY, DataRecord, check_same_data
from unite_fast.training.metrics import Averages, MetricsLog, Speedometer, loss_spike
from unite_fast.training.molecule_validation import MoleculeValidation
from unite_fast.training.network_share import measure_network
from unite_fast.training.parallelize import build_model
from unite_fast.training.profiling import StepProfiler
from unite_fast.training.run_folder import (
    OpenFolder,
    check_apart,
    check_new,
    check_shared,
    choose_folder,
    failed_status,
    final_status,
    find_start,
    lock_run,
    note_failed_start,
    orphaned_status,
    restarted,
    write_status,
)
from unite_fast.training.setup import (
    check_cuda_graph,
    check_same_backends,
    choose_attention,
    data_lines,
    open_training_data,
    process_lines,
    start_values,
    use_device_settings,
)
from unite_fast.training.train_state import TrainState
from unite_fast.training.train_step import TrainStep, autocast
from unite_fast.training.validation import Validation
from unite_fast.training.wandb_log import WandbLog
from unite_fast.utils.device import choose_device
from unite_fast.utils.file_lock import LOCK

MOST_SKIPPED = 100
"""Skipped steps in a row that end a run with `optim.nonfinite=skip`: later steps would have the same broken weights."""


@dataclass
class Outcome:
    """The end of a run."""

    folder: Path
    steps: int
    """Optimizer steps in total, those before a resume included."""
    stopped_by: int
    """The signal that stopped the run early, or 0."""
    seconds: float
    images_per_s: float
    orphan: int | None = None
    """If the run stopped because a torchrun was killed: a rank that it had started."""


def train(config: Config, resume: bool = False, allow_change: tuple[str, ...] = ()) -> Outcome:
    """Train a recipe in its run folder.

    Args:
        resume: from the folder's latest checkpoint.
        allow_change: "data": resume although the training data changed.

    Raises:
        UserError: the folder contains a run already, settings do not fit data or checkpoint, the loss is not finite, or
            the disk is full; `LostContact` if another rank died; `TorchrunEnded` if a torchrun was killed.
    """
    device, timeout = choose_device(config.train.device), config.parallel.timeout
    start = start_values(config, {"--resume": resume, "--allow-change": allow_change, "the device": device.type})

    def record_mistake(mistake: str) -> None:
        if resume and Ranks.from_environment().main:  # without --resume the folder may be another run's
            note_failed_start(config, mistake)

    with join_training(device.type, timeout, start, record_mistake) as (ranks, device, watchdog):
        trainer = Trainer(config, resume, ranks, device, watchdog, allow_change=allow_change)
        try:
            outcome = trainer.run()
        except BaseException:
            # On a full disk or without the other ranks, closing fails as well; the first error says more.
            with suppress(UserError, RuntimeError):
                trainer.close()
            raise
        trainer.close()
        if outcome.orphan is not None:
            ranks.wait()
            raise TorchrunEnded(outcome.steps, outcome.orphan)
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
        allow_change: tuple[str, ...] = (),
    ):
        """
        Args:
            lpips: used instead of the network that `perceptual` names.
        """
        self.config, self.ranks = config, ranks
        self.watchdog = watchdog or Watchdog(Peers(ranks.rank, ranks.world), config.parallel.timeout)
        self.peers = self.watchdog.peers
        self.folder = choose_folder(config)
        check_shared(self.folder, ranks)
        self.device = device or choose_device(config.train.device)
        use_device_settings(config, self.device)
        self.source = open_training_data(config)
        check_apart(self.folder, self.source)
        batch_slice, micro_batch = split_batch(ranks, config.train.batch_size, config.train.micro_batch)
        if config.perceptual.weight:
            lpips = (lpips or load_lpips(config.perceptual)).to(self.device)

        asked, resume = resume, resume or restarted(self.folder, ranks)
        if not resume:
            ranks.run_on_first(lambda: check_new(self.folder))
        # Lock before reading, because another process that trains here writes and deletes checkpoints meanwhile.
        self.lock = lock_run(self.folder) if resume and ranks.main and (self.folder / LOCK).exists() else None
        self.open_folder: OpenFolder | None = None
        self.moves = 0
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.train.keep_every)
        self.checkpoint_schedule = CheckpointSchedule(config.train, time.monotonic())
        checkpoint = find_start(self.checkpoints, config) if resume else None
        self.found = step_folders(self.checkpoints.folder)
        self.data_record = DataRecord.of(self.source, ranks)
        self.changes, data_note = [], ""
        if checkpoint:
            self.changes, data_note = check_same_data(
                checkpoint.progress, self.data_record, checkpoint.step, KEY in allow_change
            )
        attention_note = choose_attention(config, self.device, ranks, checkpoint)
        model, self.strategy = build_model(config, ranks, self.device)
        check_cuda_graph(config, self.device, self.strategy)
        if config.model.modality == MOLECULES:
            model.size_counts.copy_(torch.tensor(self.source.class_counts()))
        self.state = TrainState(model, config)
        self.averages = Averages(self.device, config.model.modality)
        self.choice = choose_loader(config.data.loader, self.source, self.device)
        check_same_backends(self.device, self.choice.decoder, ranks)
        self.loader = self._make_loader()
        if checkpoint:
            self.restore(checkpoint)
        self.first_step = self.state.step

        self.report = Report(self.folder, config, self.device, self.state, checkpoint is not None, ranks.main)
        if asked and checkpoint is None:
            self.report.print_line(
                f"WARNING: nothing to resume in {self.folder}: starts a NEW run at step 0. If you meant another run, "
                "stop and check train.out and name"
            )
        self.sides = self.report.sides
        validation = MoleculeValidation if config.model.modality == MOLECULES else Validation
        self.validation = validation(config, self.folder, self.device, self.state.step, len(self.source), self.sides)
        notes = {
            "attention": attention_note,
            "kernels": backend.unmeasured(self.device),
            "evaluation": self.validation.warning,
        }
        for line in (
            *data_lines(config, self.source, self.choice, data_note),
            *(f"{part}: {note}" for part, note in notes.items() if note),
            *process_lines(config, self.strategy, ranks),
        ):
            self.report.print_line(line)
        self.speed = Speedometer(config, self.device)
        self.train_step = TrainStep(
            self.state, config, batch_slice, micro_batch, lpips, self.strategy, self.speed.clock, self.beat_computing
        )
        self.network = measure_network(config, self.strategy.name, self.device, ranks)
        self.log: MetricsLog | None = None
        self.profiler: StepProfiler | None = None
        wandb = WandbLog(config, self.folder, self.sides) if config.train.wandb and ranks.main else None
        self.watchdog.before_exit = lambda: flight_recorder.dump(self.folder / "flight_recorder", ranks.rank)
        # Write only now, after all ranks came this far: a mistake found above leaves no folder that counts as a run.
        ranks.wait()
        if ranks.main:
            self._start_run_folder(wandb)
        self.report.print_line(self.speed.mfu_note)

    def _make_loader(self) -> Loader:
        return Loader(
            self.source,
            self.config.train.batch_size,
            self.config.seed,
            self.config.data.workers,
            rank=self.ranks.rank,
            world=self.ranks.world,
            reader=self.choice.reader,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint into state, averages and loader."""
        saved_decoder = checkpoint.progress.get("decoder", self.choice.decoder)
        require(
            saved_decoder == self.choice.decoder,
            f"cannot resume: {saved_decoder} decoded the run's images, but {self.choice.decoder} would now, and "
            f"its pixels differ; set data.loader={'dali' if saved_decoder == 'dali' else 'webdataset'}",
        )
        self.checkpoints.load_into(checkpoint, self.state.tensors())
        self.state.resume_at(checkpoint.step)
        try:
            self.averages.load_state_dict(checkpoint.progress["averages"])
            self.loader.load_state_dict(checkpoint.progress["loader"])
            self.state.skipped_steps.fill_(checkpoint.progress["skipped_steps"])
        except KeyError as error:
            raise UserError(f"cannot resume from {checkpoint.path}: it has no {error}") from error

    def _start_run_folder(self, wandb: WandbLog | None) -> None:
        """Lock the folder, and write config, status and logs to it."""
        self.lock = self.lock or lock_run(self.folder)
        if step_folders(self.checkpoints.folder) != self.found:
            raise TemporaryError(f"another process trained in {self.folder} meanwhile; start again with --resume")
        self.open_folder = OpenFolder(self.folder, self.config, self.lock)
        self.watchdog.record_mistake = self._record_mistake
        self.log = MetricsLog(self.folder, self.state.step, wandb, self.sides)
        self.profiler = StepProfiler(self.config.profile, self.folder, self.device, self.report.print_line)

    def _record_mistake(self, mistake: str) -> None:
        """Note in the folder's status that a restart would fail again. Called in any thread."""
        with suppress(UserError):
            write_status(self.folder, failed_status(self.state.step, mistake))

    def run(self) -> Outcome:
        """Train until `train.steps` or a signal."""
        config, state = self.config.train, self.state
        started_at = time.perf_counter()
        self.logged_step, stopped_by = self.first_step, 0
        self.speed.clock.start()
        # `report_lost_contact` inside `stop_on_signals`: torchrun sends the surviving ranks SIGTERM while they find out
        # who is missing.
        with stop_on_signals(self.peers) as stop_vote, report_lost_contact(self.watchdog), self.report.progress_bar():
            while state.step < config.steps and not (stopped_by := self.vote_to_stop(stop_vote)):
                if self.profiler:
                    self.profiler.before(state.step + 1)
                with self.speed.clock.measure("data"):
                    batch = self.read()
                losses, grad_norm = self.step(batch)
                if self.profiler:
                    with self.sides.attempt("profile"):
                        self.profiler.after(state.step)
                self.averages.add(state.step, losses, grad_norm)
                if state.step % config.log_every == 0:
                    self.write_metrics()
                # Before the checkpoint: a run killed in between resumes before this step and validates it again.
                if self.validation.due(state.step):
                    self.watchdog.beat(state.step, "evaluating", patient=True)
                    self.report.print_line(self.validation.run(state, self.log))
                if self.checkpoint_schedule.due(state.step) or stop_vote.save_now:
                    self.save()
                if config.picture_every and state.step % config.picture_every == 0:
                    self.save_pictures()
                self.report.advance()
            if self.checkpoint_schedule.saved_step != state.step:
                self.save()
            if self.follow_folder():  # the last save may have missed it
                self.save()
            self.checkpoints.wait()
        seconds = time.perf_counter() - started_at
        if not stopped_by and not (config.picture_every and state.step % config.picture_every == 0):
            self.save_pictures()
        speed = (state.step - self.first_step) * config.batch_size / seconds
        orphan = stop_vote.orphan if stopped_by else None
        outcome = Outcome(self.folder, state.step, stopped_by, seconds, speed, orphan)
        if self.ranks.main:
            status = final_status(state.step, stopped_by) if orphan is None else orphaned_status(state.step, orphan)
            with self.sides.attempt("status"):
                write_status(self.folder, status)
        self.report.summary(outcome, dict(self.unreadable_samples()))
        return outcome

    def vote_to_stop(self, stop_vote: StopVote) -> int:
        """The signal for which all ranks stop now; 0: continue."""
        self.watchdog.beat(self.state.step + 1, "waiting for the other processes")
        if self.ranks.main and self.checkpoint_schedule.minutes_due(time.monotonic()):
            stop_vote.save_wanted = True
        return stop_vote.next_result()

    def read(self) -> Batch:
        self.watchdog.beat(self.state.step + 1, f"reading {self.config.model.modality}")
        return next(self.loader)

    def step(self, batch: Batch) -> tuple[Losses, Tensor]:
        """One optimizer step; see `TrainStep`."""
        return self.train_step(batch)

    def beat_computing(self) -> None:
        # Patient in the first step, which compiles.
        self.watchdog.beat(self.state.step + 1, "computing", patient=self.state.step == self.first_step)

    def save_pictures(self) -> None:
        """All ranks sample together, because the weights may be sharded; rank 0 writes."""
        self.watchdog.beat(self.state.step, "drawing pictures", patient=True)
        # FSDP gathers sharded weights in the training precision, so activations must have it too.
        with autocast(self.device, self.config.train.network_precision):
            self.report.save_pictures(self.log.rows if self.log else [])

    def write_metrics(self) -> None:
        self.watchdog.beat(self.state.step, "writing metrics")
        self.check_finite()
        means, gain = self.averages.take(), self.latent_gain()
        latent_rms = math.sqrt(means.pop("latent_square"))
        steps, self.logged_step = self.state.step - self.logged_step, self.state.step
        speed = self.speed.row(steps)
        if self.log is None:
            return
        row = {
            "step": self.state.step,
            "epoch": self.state.step * self.config.train.batch_size / len(self.source),
            **means,
            "latent_rms": latent_rms,
            "latent_gain": gain,
            "lr": self.state.last_learning_rate,
            "skipped_steps": int(self.state.skipped_steps),
            **speed,
        }
        before = self.log.rows[-1].get("skipped_steps") if self.log.rows else 0
        if skipped := row["skipped_steps"] - (before if isinstance(before, int) else 0):
            self.report.print_line(f"skipped {skipped} steps: gradients not finite (optim.nonfinite=skip)")
        with self.sides.attempt("the run folder"):
            self._look_for_folder()
        self.log.write(row)
        self.report.show(row)
        if self.network and (note := self.network.note(self.config.train.batch_size / row["images_per_s"])):
            self.report.print_line(note)
        if spike := loss_spike(self.log.rows):
            self.report.print_line(spike)

    def latent_gain(self) -> float:
        """Root mean square of the weight of the latents' LayerNorm; 1 if it has none. All ranks call this together."""
        return float(full_tensor(self.state.model.latent_norm.weight.detach()).square().mean().sqrt())

    def save(self) -> None:
        self.watchdog.beat(self.state.step, "saving a checkpoint", patient=True)
        self.check_finite()
        self.follow_folder()
        progress = {
            "averages": self.averages.state_dict(),
            "loader": {**self.loader.state_dict(), "skipped": self.unreadable_samples()},
            KEY: self.data_record.tree(),
            CHANGES: self.changes,
            "decoder": self.choice.decoder,
            "attention": backend.attention_on(self.device),
            "skipped_steps": int(self.state.skipped_steps),
        }
        tensors = self.state.tensors()
        # The loss of this step can be finite and its update not.
        if not self.checkpoints.all_finite(tensors):
            raise UserError(f"the weights after step {self.state.step} are not finite; {self.last_good_checkpoint()}")
        if self.log:
            self.log.flush()
        self.checkpoints.save(self.state.step, self.config, progress, tensors)
        self.checkpoint_schedule.saved(self.state.step, time.monotonic())

    def follow_folder(self) -> bool:
        """Wait for the last save. If the run folder was moved since that began, go on where it is now; if it was
        deleted, in a new one. All ranks call this together; returns whether it happened.

        Raises:
            UserError: the last save failed, for another reason.
        """
        failure = None
        try:
            self.checkpoints.wait()
        except UserError as error:
            failure = error
        self.folder, moves = self.ranks.run_on_first(self._look_for_folder)
        self.checkpoints.folder = self.folder / "checkpoints"
        moved, self.moves = moves > self.moves, moves
        if failure and not moved:
            raise failure
        return moved

    def _look_for_folder(self) -> tuple[Path, int]:
        """The run folder, and how often it was moved or deleted. Only on rank 0."""
        assert self.open_folder is not None  # rank 0 has one
        if line := self.open_folder.follow():
            self.report.print_line(line)
            self.folder = self.report.folder = self.open_folder.path
            for part in (self.validation, self.log, self.profiler):
                if part:
                    part.use(self.folder)
        return self.folder, self.open_folder.moves

    def unreadable_samples(self) -> list[list[str]]:
        """[name, reason] of each unreadable sample so far, gathered over ranks: each sees only its slice of the
        batch."""
        reasons = {name: reason for one in self.ranks.gather(self.loader.skipped) for name, reason in one.items()}
        return [list(item) for item in reasons.items()]

    def check_finite(self) -> None:
        """
        Raises:
            UserError: a loss or gradient since the last check was not finite, or `MOST_SKIPPED` steps were skipped in
                a row.
        """
        if self.config.optim.nonfinite == "skip":
            skipped = int(self.state.skipped_in_a_row)
            if skipped >= MOST_SKIPPED:
                raise UserError(
                    f"the last {skipped} steps were skipped, because their gradients are not finite "
                    "(optim.nonfinite=skip); lower schedule.lr and start again"
                )
            return
        bad_step = self.averages.bad_step()
        if bad_step is not None:
            raise UserError(f"the loss or gradient of step {bad_step} is not finite; {self.last_good_checkpoint()}")

    def last_good_checkpoint(self) -> str:
        """Clause for an error message: the last good checkpoint, or that there is none."""
        with suppress(UserError):  # the save in progress may become the last good checkpoint
            self.checkpoints.wait()
        saved = [path for path in step_folders(self.checkpoints.folder) if step_of(path) < self.state.step]
        return f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved before it"

    def close(self) -> None:
        try:
            self.checkpoints.close()
        finally:
            self.loader.close()
            if self.profiler:
                with self.sides.attempt("profile"):
                    self.profiler.close()
            if self.log:
                self.log.close()
            if self.open_folder:
                self.open_folder.close()
            elif self.lock:
                self.lock.close()
