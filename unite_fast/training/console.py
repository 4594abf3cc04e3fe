"""Console output of a run: header, progress bar, pictures, summary."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from unite_fast.config import IMAGES, MOLECULES, Config
from unite_fast.evaluation.batches import HELD_OUT
from unite_fast.kernels import backend
from unite_fast.optim.lr_schedule import describe_rate
from unite_fast.sampling import sampler
from unite_fast.training.metrics import straggler
from unite_fast.training.pictures import open_pictures
from unite_fast.training.side_outputs import SideOutputs
from unite_fast.training.train_state import TrainState
from unite_fast.utils.files import make_folder
from unite_fast.utils.images import save_curves, save_png
from unite_fast.utils.progress import progress_bar

MAX_SKIPPED_SHOWN = 10
"""Unreadable files that the summary lists."""


class Report:
    def __init__(
        self, folder: Path, config: Config, device: torch.device, state: TrainState, resumed: bool, main: bool = True
    ):
        """`main`: whether this is rank 0, which prints and writes."""
        self.folder, self.config, self.state, self.main = folder, config, state, main
        # Names of runs, folders and files must not be read as markup.
        self.console = Console(markup=False, emoji=False, highlight=False, quiet=not main)
        parameters = sum(p.numel() for p in state.model.parameters()) / 1e6
        train = config.train
        mode = "compiled" if train.compile else "eager"
        self.print_line(
            f"{'resuming' if resumed else 'training'} {config.name}: {parameters:.2f} M parameters, "
            f"{train.precision} on {device}, {backend.backend_on(device)} kernels, {backend.attention_on(device)} "
            f"attention, {mode}, batch {train.batch_size}, "
            f"steps {state.step}..{train.steps}, in {folder}"
        )
        self.print_line(describe_rate(config.schedule, train.batch_size))
        self.pictures = open_pictures(config)
        self.of_real = self.pictures.of_real
        if self.of_real != HELD_OUT:
            self.print_line(f"reconstructions.png shows {self.of_real}")
        self.bar = progress_bar(self.console, main)
        self.sides = SideOutputs(self.print_line)

    def print_line(self, line: str) -> None:
        """Print a line without wrapping it."""
        self.console.print(line, soft_wrap=True)

    @contextmanager
    def progress_bar(self) -> Iterator[None]:
        """A progress bar on a terminal; elsewhere `show` prints a line per log interval."""
        self.started_at, self.first_step = time.perf_counter(), self.state.step
        line = "compiling" if self.config.train.compile else "starting"
        self.task = self.bar.add_task(line, total=self.config.train.steps, completed=self.state.step)
        with self.bar:
            yield

    def advance(self) -> None:
        self.bar.update(self.task, completed=self.state.step)

    def show(self, row: dict) -> None:
        """Show a row of metrics."""
        molecules = self.config.model.modality == MOLECULES
        other = f" lpips {row['lpips']:.4f}" if self.config.perceptual.weight else ""
        other = f" elements {row['cross_entropy']:.4f}" if molecules else other
        mfu = f" mfu {row['mfu']:.1%}" if "mfu" in row else ""
        speed = f"{row['images_per_s']:.0f} {'mol/s' if molecules else 'img/s'}{mfu}"
        line = f"{speed}  l1 {row['l1']:.4f}{other} flow {row['flow']:.3f}"
        self.bar.update(self.task, description=line)
        if not self.console.is_terminal:
            per_step = (time.perf_counter() - self.started_at) / (self.state.step - self.first_step)
            left = per_step * (self.config.train.steps - self.state.step)
            self.print_line(
                f"step {row['step']}/{self.config.train.steps}  {line}  lr {row['lr']:.2e}  {left:.0f} s left"
                f"{straggler(row)}"
            )

    @torch.no_grad()
    def save_pictures(self, rows: list[dict]) -> None:
        """Save samples, reconstructions of real images, and curves, using the averaged weights. All ranks call this
        together."""
        # Eager, because sampling has other shapes, and compiling for them would take longer than sampling.
        try:
            with self.state.ema.applied(), torch.compiler.set_stance("force_eager"):
                made: tuple[Any, Any] = self.pictures.make(self.state.model)
        except sampler.NonFinite as error:  # on all ranks: they sample the same images
            self.print_line(f"warning: no pictures of step {self.state.step}: {error}")
            return
        if not self.main:
            return
        name = f"step_{self.state.step:08d}.png"
        for kind, draw in self.pictures.drawings(*made).items():
            with self.sides.attempt(kind):
                picture = draw()
                save_png(picture, self.folder / f"{kind}.png")
                make_folder(self.folder / kind)
                save_png(picture, self.folder / kind / name)
        if rows:
            with self.sides.attempt("curves.png"):
                save_curves(rows, self.folder / "curves.png")

    def summary(self, outcome, skipped: dict[str, str]) -> None:
        """Print the paths of all results.

        Args:
            skipped: name and reason of each unreadable file.
        """
        self._line("run folder", self.folder)
        modality = self.config.model.modality
        trained = f"{outcome.steps} steps, {outcome.seconds:.0f} s, {outcome.images_per_s:.0f} {modality}/s"
        self._line("trained", trained)
        self._line("checkpoint", self.folder / "checkpoints" / "latest")
        for picture in ("samples", "reconstructions", "curves"):
            if (self.folder / f"{picture}.png").exists():
                unusual = picture == "reconstructions" and self.of_real != HELD_OUT
                note = f" (of {self.of_real.partition(':')[0]})" if unusual else ""
                self._line(picture, f"{self.folder / picture}.png{note}")
        self._line("metrics", self.folder / "metrics.jsonl")
        self._line("events", f"tensorboard --logdir {self.folder / 'tensorboard'}")
        if skipped:
            self._line("skipped", f"{len(skipped)} unreadable file{'s' * (len(skipped) > 1)}:")
            for name, reason in list(skipped.items())[:MAX_SKIPPED_SHOWN]:
                self._line("", f"{name}: {reason}")
            if len(skipped) > MAX_SKIPPED_SHOWN:
                self._line("", f"and {len(skipped) - MAX_SKIPPED_SHOWN} more, each named in an earlier warning")
        if outcome.stopped_by:
            self._line("stopped", f"at step {outcome.steps} of {self.config.train.steps}; --resume continues")
        else:
            # The class of a molecule is always given, so there is nothing to guide.
            guided = " --guidance 2" if modality == IMAGES else ""
            self._line("next", f"unite-fast sample {self.folder}{guided}")

    def _line(self, label: str, text: object) -> None:
        self.print_line(f" {label:<16} {text}")
