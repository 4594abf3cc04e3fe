"""The training loop and what surrounds it: a run's folder, resuming, stopping."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import yaml
from torch import Tensor

from unite_fast.config import Config, EvaluationConfig, require, require_choice
from unite_fast.data_pipeline import Batch, Loader, Source, choose_loader, open_source
from unite_fast.errors import UserError, writing
from unite_fast.evaluation.during_training import DuringTraining
from unite_fast.kernels import backend
from unite_fast.model.unite import UNITE
from unite_fast.objective import Losses, draw_step, training_losses
from unite_fast.perceptual import dropout_masks, load_lpips, tap_shapes
from unite_fast.randomness import Philox, Stream
from unite_fast.recipes import to_tree
from unite_fast.training import checkpoint as ckpt
from unite_fast.training.metrics import Averages, MetricsLog
from unite_fast.training.report import Report
from unite_fast.training.state import TrainState

FREE_ON_RESUME = {
    "name",
    "data.path",
    "data.loader",
    "data.workers",
    *(
        f"train.{key}"
        for key in ("steps", "device", "log_every", "checkpoint_every", "keep_every", "picture_every", "out")
    ),
    "train.evaluate_every",
    *(f"evaluation.{key.name}" for key in fields(EvaluationConfig)),
}
"""Settings that a resumed run may change: they do not change what a step computes."""


@dataclass
class Outcome:
    """How a run ended."""

    folder: Path
    steps: int
    stopped_by: int | None
    """The signal that ended it early."""
    seconds: float
    images_per_s: float


def train(config: Config, resume: bool = False) -> Outcome:
    """Train a recipe in its run folder.

    Raises:
        UserError: a folder that holds a run already, settings that do not fit data or checkpoint, a loss that is not
            finite, a full disk.
    """
    trainer = Trainer(config, resume)
    try:
        outcome = trainer.run()
    except BaseException:
        with suppress(UserError):  # on a full disk closing fails too, and the first error says more
            trainer.close()
        raise
    trainer.close()
    return outcome


class Trainer:
    def __init__(self, config: Config, resume: bool):
        self.config = config
        self.folder = Path(config.train.out or f"runs/{config.name}")
        self.device = choose_device(config.train.device)
        use_threads(config.train.threads)
        backend.use(config.kernels)
        backend.use_attention(config.attention)
        self.source = open_source(config.data.source, config.data.path, config.model.image_size, "train")
        check_data(self.source, config)
        self.lpips = load_lpips(config.perceptual).to(self.device) if config.perceptual.weight else None

        found = find_start(self.folder, config, resume)
        self.state = TrainState(UNITE.create(config.model, config.seed).to(self.device), config)
        self.averages = Averages(self.device)
        self.choice = choose_loader(config.data.loader, self.source, self.device)
        self.loader = Loader(
            self.source, config.train.batch_size, config.seed, config.data.workers, reader=self.choice.reader
        )
        if found:
            self.restore(found)
        self.report = Report(self.folder, config, self.device, self.state, found is not None)
        self.report.say(f"data: {len(self.source)} images, {self.choice.name} loader ({self.choice.why})")
        self.evaluation = DuringTraining(config, self.folder, self.device, self.state.step)
        # Only now, so that a mistake found above leaves no folder that counts as a run.
        write_config(self.folder, config)
        self.log = MetricsLog(self.folder, self.state.step)
        if config.train.compile:
            compile_blocks(self.state.model)

    def restore(self, found: ckpt.Checkpoint) -> None:
        before = found.progress.get("decoder", self.choice.decoder)
        require(
            before == self.choice.decoder,
            f"cannot resume: {before} decoded the run's images, {self.choice.decoder} would now, and their pixels "
            f"differ; set data.loader={'dali' if before == 'dali' else 'webdataset'}",
        )
        try:
            self.state.load_tensors(found.tensors, found.step)
            self.averages.load_state_dict(found.progress["averages"])
            self.loader.load_state_dict(found.progress["loader"])
        except (RuntimeError, KeyError) as error:
            # A RuntimeError of torch's lists the tensors that do not fit below a headline.
            reason = str(error).splitlines()[:2][-1].strip()
            lacks = "it lacks " if isinstance(error, KeyError) else ""
            raise UserError(f"cannot resume from the checkpoint in {self.folder}: {lacks}{reason}") from error

    def run(self) -> Outcome:
        config, state = self.config.train, self.state
        begun = self.clock = time.perf_counter()
        first_step = self.logged_step = state.step
        with stop_on_signals() as stop, self.report.progress_bar():
            while state.step < config.steps and not stop:
                batch = next(self.loader)
                losses, grad_norm = self.step(batch)
                self.averages.add(state.step, losses, grad_norm)
                if state.step % config.log_every == 0:
                    self.write_metrics()
                # Before the checkpoint, so that none counts a step as done whose evaluation a killed run still owes.
                if self.evaluation.due(state.step):
                    self.report.say(self.evaluation.run(state, self.log))
                if state.step % config.checkpoint_every == 0:
                    self.save()
                if config.picture_every and state.step % config.picture_every == 0:
                    self.report.save_pictures(self.log.rows)
                self.report.advance()
            if state.step % config.checkpoint_every or state.step == first_step:
                self.save()
        seconds = time.perf_counter() - begun
        if not stop:
            self.report.save_pictures(self.log.rows)
        speed = (state.step - first_step) * config.batch_size / seconds
        outcome = Outcome(self.folder, state.step, stop[0] if stop else None, seconds, speed)
        self.report.summary(outcome, self.loader.skipped)
        return outcome

    def step(self, batch: Batch) -> tuple[Losses, Tensor]:
        """One optimizer step: mean losses of the batch and gradient norm before clipping, all on the device."""
        config = self.config
        micro = config.train.micro_batch or config.train.batch_size
        parts = config.train.batch_size // micro
        sums = torch.zeros(4, device=self.device)
        for start in range(0, config.train.batch_size, micro):
            losses = self.micro_step(batch, slice(start, start + micro))
            (losses.total / parts).backward()
            sums += torch.stack([losses.total.detach(), losses.l1, losses.flow, losses.lpips]) / parts
        return Losses(*sums.unbind()), self.state.apply_gradients()

    def micro_step(self, batch: Batch, places: slice) -> Losses:
        config = self.config
        philox = Philox(config.seed, self.state.step, torch.arange(places.start, places.stop, device=self.device))
        images = batch.images[places].to(self.device, non_blocking=True).float() / 255
        labels = batch.labels[places].to(self.device, non_blocking=True)
        if config.data.flip:
            images = random_flip(images, philox)
        draws = draw_step(config.objective, philox, (config.model.latent_tokens, config.model.latent_channels))
        masks = None
        if self.lpips is not None and config.perceptual.dropout:
            masks = dropout_masks(philox, tap_shapes(*images.shape[2:]))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.train.precision == "bfloat16"):
            return training_losses(self.state.model, images, labels, draws, config, self.lpips, masks)

    def write_metrics(self) -> None:
        self.check_finite()
        now = time.perf_counter()
        steps = self.state.step - self.logged_step
        row = {
            "step": self.state.step,
            "epoch": self.state.step * self.config.train.batch_size / len(self.source),
            **self.averages.take(),
            "lr": self.state.last_learning_rate,
            "images_per_s": steps * self.config.train.batch_size / (now - self.clock),
        }
        self.clock, self.logged_step = now, self.state.step
        self.log.write(row)
        self.report.show(row)

    def save(self) -> None:
        self.check_finite()
        self.log.flush()
        progress = {"averages": self.averages.state_dict(), "loader": self.loader.state_dict()}
        progress["decoder"] = self.choice.decoder
        path = ckpt.step_path(self.folder / "checkpoints", self.state.step)
        tensors = self.state.tensors()
        # A loss of this step can be finite although its update was not.
        if not all(bool(value.isfinite().all()) for value in tensors.values()):
            raise UserError(f"the weights after step {self.state.step} are not finite; {self.last_good()}")
        ckpt.save_checkpoint(path, self.config, self.state.step, progress, tensors)
        ckpt.point_latest(path)
        ckpt.prune(path.parent, self.config.train.keep_every, self.state.step)

    def check_finite(self) -> None:
        bad = self.averages.bad_step()
        if bad is not None:
            raise UserError(f"the loss or gradient of step {bad} is not finite; {self.last_good()}")

    def last_good(self) -> str:
        saved = [path for path in ckpt.step_files(self.folder / "checkpoints") if ckpt.step_of(path) < self.state.step]
        return f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved before it"

    def close(self) -> None:
        self.loader.close()
        self.log.close()


def use_threads(threads: int) -> None:
    if threads:
        torch.set_num_threads(threads)


def choose_device(name: str) -> torch.device:
    require_choice("the device", name, ("auto", "cpu", "cuda"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    require(name != "cuda" or torch.cuda.is_available(), "the device is cuda, but torch sees no CUDA device here")
    return torch.device(name)


def check_data(source: Source, config: Config) -> None:
    classes = len(source.class_names)
    require(
        classes == config.model.num_classes,
        f"the data have {classes} classes, but model.num_classes is {config.model.num_classes}",
    )


def find_start(folder: Path, config: Config, resume: bool) -> ckpt.Checkpoint | None:
    """The checkpoint to go on from, if there is one and it is asked for."""
    saved = ckpt.step_files(folder / "checkpoints")
    if resume and saved:
        found = ckpt.load_checkpoint(folder)
        check_same_settings(found.config, config)
        require(bool(found.progress), f"{folder}'s checkpoint holds weights alone (imported?): nothing to resume")
        return found
    require(
        resume or not (saved or (folder / "config.yaml").exists()),
        f"{folder} holds a run already; continue it with --resume or choose another folder with train.out=FOLDER",
    )
    return None


def write_config(folder: Path, config: Config) -> None:
    with writing(folder / "config.yaml"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(to_tree(config), sort_keys=False))


def check_same_settings(before: Config, now: Config) -> None:
    old, new = flatten(to_tree(before)), flatten(to_tree(now))
    for key, value in new.items():
        require(
            old[key] == value or key in FREE_ON_RESUME,
            f"cannot resume: {key} is {value} now and was {old[key]} in the run; give the same settings as then",
        )


def flatten(tree: dict, path: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return flat


def compile_blocks(model: UNITE) -> None:
    """Compile each transformer block on its own: blocks of one kind share the compiled code."""
    torch._dynamo.config.recompile_limit = 64  # a block meets several sequence lengths, each compiled for itself
    for block in (*model.encoder.blocks, *model.decoder.layers):
        block.compile(dynamic=False)


def random_flip(images: Tensor, philox: Philox) -> Tensor:
    """Mirror half of the images [B, 3, S, S], chosen by their places in the global batch."""
    flipped = philox.uniform(Stream.FLIP) < 0.5
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM comes, so that the loop can end between two steps. A second signal
    acts as it would without us."""
    received: list[int] = []

    def remember(number, _frame):
        received.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
