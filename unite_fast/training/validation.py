"""Validation during training: scores of samples from the averaged weights, as a curve over steps. Of images it is the
Frechet distance; molecule_validation.py has molecules.

All ranks share the work. Training is not affected: the weights are restored, noise is a function of (seed, sample
number), and the network runs eagerly, so nothing is recompiled.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unite_fast.config import TRAINING_SAMPLES, Config
from unite_fast.distributed.process_group import current_ranks
from unite_fast.errors import require
from unite_fast.evaluation.evaluator import bias_warning, open_evaluator
from unite_fast.evaluation.fid import Moments
from unite_fast.evaluation.provenance import sampling_info
from unite_fast.evaluation.settings import EvaluationSettings
from unite_fast.model.unite import UNITE
from unite_fast.sampling import sampler
from unite_fast.sampling.solvers import ADAPTIVE_SOLVERS
from unite_fast.training.metrics import MetricsLog
from unite_fast.training.side_outputs import SideOutputs
from unite_fast.training.train_state import TrainState
from unite_fast.utils.files import atomic_write, make_folder, save_text
from unite_fast.utils.rows import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER, ROWS, CURVE = "evaluation", "curve.jsonl", "curve.png"


class ValidationCurve:
    """What the validations of images and of molecules share: their steps, the samples, and the files.

    Attributes:
        every: steps between validations, maybe fractional; 0: none.
        warning: a caveat about its scores; may be empty.
        rows: of curve.jsonl, up to the current step; each has step, scores and how they were measured.
        count: samples of a validation.
        measured: how they are scored, for the rows.
        nonfinite: samples of this rank that were not finite in the last validation.
    """

    count: int
    measured: dict
    nonfinite: int

    def __init__(
        self,
        config: Config,
        folder: Path,
        device: torch.device,
        step: int,
        samples: int,
        sides: SideOutputs | None = None,
    ):
        """All ranks call this together.

        Args:
            folder: run folder; results go to its subfolder evaluation.
            step: current step. Rows after it are dropped: a run that was killed after its last checkpoint writes them
                again.
            samples: number of training samples in an epoch.

        Raises:
            UserError: dopri5 on several processes; see also `open`.
        """
        self.config, self.warning = config, ""
        self.every = config.train.evaluate_every or config.train.evaluate_epochs * samples / config.train.batch_size
        self.ranks, self.sides = current_ranks(), sides or SideOutputs()
        self.use(folder)
        before = []
        if self.ranks.main:
            with self.sides.attempt("evaluation"):
                before = read_rows(self.folder / ROWS)
        self.rows = [row for row in before if row["step"] <= step]
        if self.ranks.main and len(self.rows) < len(before):
            self.write()
        if not self.every:
            return
        # A sharded model needs all ranks in each pass, and dopri5 takes a different number of passes on each rank.
        require(
            self.ranks.world == 1 or config.sampling.solver not in ADAPTIVE_SOLVERS,
            "evaluation during training on several processes needs a solver with fixed steps: "
            "set sampling.solver=multistep",
        )
        self.open(device)

    def open(self, device: torch.device) -> None:
        """Open what the scores need, and set `count`, `measured` and `warning`.

        Raises:
            UserError: something is missing or does not fit.
        """
        raise NotImplementedError

    def score(self, model: UNITE) -> tuple[dict, int]:
        """Scores of `count` samples, and how many of them are not finite, which leaves no scores; the same on all
        ranks."""
        raise NotImplementedError

    def scalars(self, row: dict) -> dict[str, float]:
        """The curves for TensorBoard."""
        raise NotImplementedError

    def line(self, row: dict) -> str:
        """The scores for the console."""
        raise NotImplementedError

    def plot(self, axes: "Axes") -> None:
        """Draw the rows."""
        raise NotImplementedError

    def use(self, folder: Path) -> None:
        """Write to this run folder from now on: it was moved."""
        self.folder = folder / FOLDER

    def due(self, step: int) -> bool:
        """Whether to validate after this step."""
        return self.every > 0 and int(step / self.every) > int((step - 1) / self.every)

    def run(self, state: TrainState, log: MetricsLog | None) -> str:
        """Validate, and write curve.jsonl, curve.png and the TensorBoard scalars. All ranks call this together.

        Args:
            log: for TensorBoard; None on ranks that do not write.

        Returns:
            A line for the console.
        """
        started_at = time.perf_counter()
        # Eager, because sampling has other shapes, and compiling for them would take longer than sampling.
        with state.ema.applied(), torch.compiler.set_stance("force_eager"):
            scores, nonfinite = self.score(state.model)
        if nonfinite:
            return f"warning: no evaluation of step {state.step}: {nonfinite} of {self.count} samples are not finite"
        row = {
            "step": state.step,
            **scores,
            **self.measured,
            "count": self.count,
            "weights": "EMA",
            "precision": self.config.train.network_precision,
            "seed": self.config.seed,
            **{f"sampling.{key}": value for key, value in sampling_info(self.config.sampling).items()},
            "seconds": time.perf_counter() - started_at,
        }
        self.rows.append(row)
        if self.ranks.main:
            self.write()
        if log is not None:
            for name, value in self.scalars(row).items():
                log.write_scalar(name, value, state.step)
        return f"step {state.step}: {self.line(row)} ({self.count} samples, {row['seconds']:.0f} s)"

    def samples(self, model: UNITE, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's batches of samples 0 .. count - 1. All ranks call this together, to the end.

        Args:
            labels: int64 [count].

        Yields:
            The numbers of the samples, int64 [b], and the samples as `sampler.sample_batch` returns them. A batch that
            is not finite is left out and counted in `nonfinite`.
        """
        config, self.nonfinite = self.config, 0
        network = sampler.Network.of(model, config.sampling.order)
        starts = range(0, self.count, config.evaluation.batch)
        for first in range(0, len(starts), self.ranks.world):
            # In the last round some ranks have no batch left. They sample the last batch as well, because a sharded
            # model needs all ranks, and discard it.
            own = first + self.ranks.rank
            start = starts[min(own, len(starts) - 1)]
            positions = torch.arange(start, min(start + config.evaluation.batch, self.count))
            batch = labels[positions], positions, config.sampling, config.seed, config.train.network_precision
            try:
                made, _ = sampler.sample_batch(model, network, *batch)
            except sampler.NonFinite as error:  # after the last collective of the batch, so the ranks stay together
                self.nonfinite += error.count if own < len(starts) else 0
                continue
            if own < len(starts):
                yield positions, made

    def write(self) -> None:
        """Write curve.jsonl and curve.png."""
        with self.sides.attempt("evaluation"):
            make_folder(self.folder)
            save_text("".join(json.dumps(row) + "\n" for row in self.rows), self.folder / ROWS)
            with atomic_write(self.folder / CURVE) as partial:
                self.save_curve(partial)

    def save_curve(self, path: Path) -> None:
        from matplotlib.figure import Figure  # slow to import

        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        self.plot(axes)
        axes.grid(alpha=0.3, which="both")
        figure.savefig(path, dpi=110, format="png")


class Validation(ValidationCurve):
    """Of images: the Frechet distance, whose labels cycle through the classes."""

    def open(self, device: torch.device) -> None:
        """Open the reference statistics, or compute them from the training images.

        Raises:
            UserError: data, weights or statistics are missing or do not fit.
        """
        evaluation = self.config.evaluation
        settings = EvaluationSettings(
            features=evaluation.features, inception=evaluation.inception, reference=evaluation.reference
        )
        self.evaluator = open_evaluator(self.config, settings, self.ranks, device, classifier=False)
        features, reference = self.evaluator.features, self.evaluator.reference
        self.count = evaluation.count or TRAINING_SAMPLES[features.name]
        self.warning = bias_warning(self.count, features.dimension, "generated")
        self.measured = {
            "title": features.title,
            "features": features.name,
            "reference": reference.path or "training images",
            "reference_sha256": reference.sha256 or reference.provenance.get("data_sha256", ""),
        }

    def score(self, model: UNITE) -> tuple[dict, int]:
        """The Frechet distance, NaN if there is none."""
        features = self.evaluator.features
        moments = Moments(features.dimension, features.device)
        for _, images in self.samples(model, torch.arange(self.count) % self.config.model.num_classes):
            moments.update(features(images.to(features.device)).pool)
        bad = sum(self.ranks.gather(self.nonfinite))
        return {"distance": math.nan if bad else self.evaluator.distance(moments, self.ranks)}, bad

    def scalars(self, row: dict) -> dict[str, float]:
        return {"frechet_distance": row["distance"]}

    def line(self, row: dict) -> str:
        return f"{row['title']} {row['distance']:.4f}"

    def plot(self, axes: "Axes") -> None:
        rows = [row for row in self.rows if isinstance(row.get("distance"), float)]
        axes.plot([row["step"] for row in rows], [row["distance"] for row in rows], marker="o", markersize=3)
        if self.rows:
            last = self.rows[-1]
            axes.set(xlabel="step", ylabel=f"{last['title']}\n{last['count']} samples", yscale="log")
