"""Evaluation of a run while it trains: the Frechet distance of the averaged weights' samples, against the step.

All processes share the work. Nothing that training computes with is touched: the weights are put back as they were,
noise is a function of (seed, number of the sample), and the network runs eagerly, so that nothing is compiled anew.
"""

import json
import time
from pathlib import Path

import torch

from unite_fast.config import TRAINING_SAMPLES, Config, EvaluationSettings
from unite_fast.distributed.process_group import current_ranks
from unite_fast.errors import require
from unite_fast.evaluation.evaluator import bias_warning, open_evaluator
from unite_fast.evaluation.fid import Moments
from unite_fast.evaluation.provenance import sampling_info
from unite_fast.sampling import sampler
from unite_fast.sampling.solvers import ADAPTIVE_SOLVERS
from unite_fast.training.metrics import MetricsLog
from unite_fast.training.train_state import TrainState
from unite_fast.utils.files import atomic_write, read_rows, writing

FOLDER, ROWS, CURVE = "evaluation", "curve.jsonl", "curve.png"


class DuringTraining:
    """
    Attributes:
        every: steps between evaluations, perhaps with a fraction; 0: none.
        warning: why its distances are compared with care; empty if they need none.
        rows: of curve.jsonl, up to the step; each holds step, distance and how it was measured.
    """

    def __init__(self, config: Config, folder: Path, device: torch.device, step: int, images: int):
        """Reads the reference, or takes it of the training images; all processes must call it together.

        Args:
            folder: of the run; results go to its subfolder evaluation.
            step: the one the run goes on from. Rows after it are dropped: a killed run wrote them after its last
                checkpoint and writes them again.
            images: of one epoch.

        Raises:
            UserError: data, weights or statistics that are missing or do not fit; dopri5 on several processes.
        """
        self.config, self.warning = config, ""
        self.every = config.train.evaluate_every or config.train.evaluate_epochs * images / config.train.batch_size
        self.folder, self.ranks = folder / FOLDER, current_ranks()
        before = read_rows(self.folder / ROWS)
        self.rows = [row for row in before if row["step"] <= step]
        if self.ranks.main and len(self.rows) < len(before):
            self.write()
        if not self.every:
            return
        # Of a sharded model all processes run each pass together, and dopri5 takes as many as its samples ask for.
        require(
            self.ranks.world == 1 or config.sampling.solver not in ADAPTIVE_SOLVERS,
            "evaluating a run on several processes needs a solver of fixed steps: set sampling.solver=multistep",
        )
        wanted = config.evaluation
        settings = EvaluationSettings(wanted.features, wanted.inception, reference=wanted.reference)
        self.evaluator = open_evaluator(config, settings, self.ranks, device, classifier=False)
        self.count = wanted.count or TRAINING_SAMPLES[self.evaluator.features.name]
        self.warning = bias_warning(self.count, self.evaluator.features.dimension, "generated")

    def due(self, step: int) -> bool:
        return self.every > 0 and int(step / self.every) > int((step - 1) / self.every)

    def run(self, state: TrainState, log: MetricsLog | None) -> str:
        """Evaluate; all processes must call it together.

        Args:
            log: gets the distance as a scalar for TensorBoard; None on processes that do not write.

        Returns:
            A line for a person.

        Raises:
            UserError: no space left.
        """
        begun = time.perf_counter()
        # Sampling meets shapes of its own; compiling for them would take longer than drawing.
        with state.ema.applied(), torch.compiler.set_stance("force_eager"):
            distance = self.distance(state)
        features, reference = self.evaluator.features, self.evaluator.reference
        row = {
            "step": state.step,
            "distance": distance,
            "title": features.title,
            "features": features.name,
            "reference": reference.path or "training images",
            "reference_sha256": reference.sha256 or reference.provenance.get("data_sha256", ""),
            "count": self.count,
            "weights": "EMA",
            "precision": self.config.train.precision,
            "seed": self.config.seed,
            **{f"sampling.{key}": value for key, value in sampling_info(self.config.sampling).items()},
            "seconds": time.perf_counter() - begun,
        }
        self.rows.append(row)
        if self.ranks.main:
            self.write()
        if log is not None:
            with writing(log.events_path):
                log.events.add_scalar("frechet_distance", distance, state.step)
        return f"step {state.step}: {features.title} {distance:.4f} ({self.count} samples, {row['seconds']:.0f} s)"

    def distance(self, state: TrainState) -> float:
        """Of samples 0..count - 1, whose classes come in turn; the same on every process."""
        config, model = self.config, state.model
        network, device = sampler.Network.of(model, config.sampling.order), self.evaluator.features.device
        moments = Moments(self.evaluator.features.dimension, device)
        starts = range(0, self.count, config.evaluation.batch)
        for first in range(0, len(starts), self.ranks.world):
            # In the last round some processes have nothing left. They draw the last batch along, for a sharded model
            # needs them all, and forget it.
            mine = first + self.ranks.rank
            start = starts[min(mine, len(starts) - 1)]
            positions = torch.arange(start, min(start + config.evaluation.batch, self.count))
            labels = positions % config.model.num_classes
            images, _ = sampler.sample_batch(
                model, network, labels, positions, config.sampling, config.seed, config.train.precision
            )
            if mine < len(starts):
                moments.update(self.evaluator.features(images.to(device)).pool)
        return self.evaluator.distance(moments, self.ranks)

    def write(self) -> None:
        """curve.jsonl and curve.png, written aside and renamed."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            rows = "".join(json.dumps(row) + "\n" for row in self.rows)
            for name, save in ((ROWS, lambda path: path.write_text(rows)), (CURVE, self.save_curve)):
                with atomic_write(self.folder / name) as partial:
                    save(partial)

    def save_curve(self, path: Path) -> None:
        from matplotlib.figure import Figure  # slow to import

        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.plot([row["step"] for row in self.rows], [row["distance"] for row in self.rows], marker="o", markersize=3)
        if self.rows:
            last = self.rows[-1]
            axes.set(xlabel="step", ylabel=f"{last['title']}\n{last['count']} samples", yscale="log")
        axes.grid(alpha=0.3, which="both")
        figure.savefig(path, dpi=110, format="png")
