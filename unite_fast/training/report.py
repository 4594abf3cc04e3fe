"""What a person sees of a run: progress bar, pictures, closing summary."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from unite_fast import sampling
from unite_fast.config import Config
from unite_fast.data_pipeline import UnreadableSample, open_source
from unite_fast.errors import UserError
from unite_fast.pictures import grid, pairs, save_curves
from unite_fast.training.state import TrainState

PICTURE_ROWS = 8
PICTURE_COLUMNS = 10


class Report:
    def __init__(self, folder: Path, config: Config, device: torch.device, state: TrainState, resumed: bool):
        self.folder, self.config, self.state = folder, config, state
        self.console = Console()
        parameters = sum(p.numel() for p in state.model.parameters()) / 1e6
        train = config.train
        how = "compiled" if train.compile else "eager"
        self.console.print(
            f"{'resuming' if resumed else 'training'} [bold]{config.name}[/]: {parameters:.2f} M parameters, "
            f"{train.precision} on {device}, {config.kernels} kernels, {how}, batch {train.batch_size}, "
            f"steps {state.step}..{train.steps}, in {folder}"
        )
        self.held_out = held_out_images(config)
        self.bar = Progress(
            TextColumn("{task.fields[line]}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    @contextmanager
    def progress_bar(self) -> Iterator[None]:
        """Shown on a terminal; elsewhere each log interval prints a line."""
        self.begun, self.first_step = time.perf_counter(), self.state.step
        line = "compiling" if self.config.train.compile else "starting"
        self.task = self.bar.add_task("train", total=self.config.train.steps, completed=self.state.step, line=line)
        with self.bar:
            yield

    def advance(self) -> None:
        self.bar.update(self.task, completed=self.state.step)

    def show(self, row: dict) -> None:
        lpips = f" lpips {row['lpips']:.4f}" if self.config.perceptual.weight else ""
        line = f"{row['images_per_s']:.0f} img/s  l1 {row['l1']:.4f}{lpips} flow {row['flow']:.3f}"
        self.bar.update(self.task, line=line)
        if not self.console.is_terminal:
            per_step = (time.perf_counter() - self.begun) / (self.state.step - self.first_step)
            left = per_step * (self.config.train.steps - self.state.step)
            self.console.print(
                f"step {row['step']}/{self.config.train.steps}  {line}  lr {row['lr']:.2e}  {left:.0f} s left"
            )

    @torch.no_grad()
    def save_pictures(self, rows: list[dict]) -> None:
        """Samples, reconstructions of held-out images and curves, drawn with the averaged weights."""
        model, config = self.state.model, self.config
        labels = torch.arange(PICTURE_ROWS * PICTURE_COLUMNS) % min(config.model.num_classes, PICTURE_COLUMNS)
        # Sampling meets shapes of its own; compiling for them would take longer than drawing.
        with self.state.ema.applied(), torch.compiler.set_stance("force_eager"):
            samples = sampling.generate(model, labels, config.sampling, config.seed)
            reconstructions = sampling.reconstruct(model, self.held_out, config.seed)
        name = f"step_{self.state.step:08d}.png"
        for kind, picture in (
            ("samples", grid(samples, PICTURE_COLUMNS)),
            ("reconstructions", pairs(self.held_out, reconstructions, PICTURE_COLUMNS)),
        ):
            (self.folder / kind).mkdir(exist_ok=True)
            picture.save(self.folder / kind / name)
            picture.save(self.folder / f"{kind}.png")
        if rows:
            save_curves(rows, self.folder / "curves.png")

    def summary(self, outcome, skipped: dict[str, str]) -> None:
        table = Table(show_header=False, box=None)
        table.add_row("run folder", str(self.folder))
        table.add_row("trained", f"{outcome.steps} steps, {outcome.seconds:.0f} s, {outcome.images_per_s:.0f} images/s")
        table.add_row("checkpoint", str(self.folder / "checkpoints" / "latest.safetensors"))
        if (self.folder / "samples.png").exists():
            table.add_row("samples", str(self.folder / "samples.png"))
            table.add_row("reconstructions", str(self.folder / "reconstructions.png"))
            table.add_row("curves", str(self.folder / "curves.png"))
        table.add_row(
            "metrics", f"{self.folder / 'metrics.jsonl'}, and tensorboard --logdir {self.folder / 'tensorboard'}"
        )
        if skipped:
            table.add_row("skipped", f"{len(skipped)} unreadable files, e.g. {next(iter(skipped))}")
        if outcome.stopped_by:
            table.add_row("stopped", f"at step {outcome.steps} of {self.config.train.steps}; --resume continues")
        else:
            table.add_row("next", f"unite-fast sample {self.folder} --guidance 2")
        self.console.print(table)


def held_out_images(config: Config) -> torch.Tensor:
    """Some images of the test split, or of the training data where there is no test split: uint8 [n, 3, S, S]."""
    kind, path, size = config.data.source, config.data.path, config.model.image_size
    try:
        source = open_source(kind, path, size, "test")
    except UserError:
        source = open_source(kind, path, size, "train")
    wanted, images = PICTURE_ROWS * PICTURE_COLUMNS // 2, []
    for index in range(len(source)):
        try:
            images.append(source.read([index])[0])
        except UnreadableSample:
            continue
        if len(images) == wanted:
            break
    return torch.cat(images)
