"""Evaluate a trained model: generated images against real ones, reconstructions against their originals."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from unite_fast.config import SamplingConfig
from unite_fast.data_pipeline.splits import ClassesDiffer, check_same_classes
from unite_fast.distributed.process_group import Ranks, current_ranks
from unite_fast.errors import UserError
from unite_fast.evaluation import report
from unite_fast.evaluation.batches import open_held_out_images
from unite_fast.evaluation.evaluator import Evaluator, open_evaluator
from unite_fast.evaluation.provenance import checkpoint_info, machine_info, sampling_info
from unite_fast.evaluation.reconstruction import score_reconstructions
from unite_fast.evaluation.settings import EVALUATION_SAMPLES, EvaluationSettings
from unite_fast.sampling.distributed_sampler import Generation, Samples, sample_distributed
from unite_fast.sampling.pipeline import TrainedUNITE
from unite_fast.utils.progress import Track, no_progress

GRID = 80
"""Generated images in the grid that is saved with a result."""


def evaluate(
    model: TrainedUNITE,
    settings: EvaluationSettings,
    out: Path | None = None,
    checkpoint: str = "",
    track: Track = no_progress,
) -> dict:
    """Score reconstructions, then generated images for each guidance scale. The ranks of an initialised
    `torch.distributed` share the work.

    Args:
        model: on the device to evaluate on.
        out: folder for evaluation.json, evaluation.md and the grids, which rank 0 writes; None: write nothing.
        checkpoint: path of the model, for the JSON.
        track: shows progress; see `utils.progress`.

    Returns:
        The content of evaluation.json, the same on every rank. `generated` has one entry per guidance scale.

    Raises:
        UserError: data, weights or statistics are missing or do not match; settings out of range.
    """
    if out is not None:
        report.check_folder(out, report.FILES)
    start, ranks = time.perf_counter(), current_ranks()
    configs = sampling_configs(model, settings)  # first: cheap, and may raise
    device = model.network.device
    evaluator = open_evaluator(model.config, settings, ranks, device, track, class_names=model.class_names)
    count = settings.count or EVALUATION_SAMPLES[evaluator.features.name]
    generations = make_generations(model, configs, settings, count)
    opened = time.perf_counter() - start
    # Before generation, which takes hours: missing data should show early.
    reconstruction, pairs = _evaluate_reconstructions(model, settings, evaluator, ranks, track)
    generated, grids = [], {}
    for generation in generations:
        scores, images = _evaluate_generation(model, generation, evaluator, ranks, track)
        generated.append(scores)
        grids[f"samples_guidance_{generation.sampling.guidance:g}.png"] = images
    result = {
        "checkpoint": checkpoint_info(model, checkpoint),
        "features": {
            "name": evaluator.features.name,
            "title": evaluator.features.title,
            "dimension": evaluator.features.dimension,
            **evaluator.features.source,
        },
        "reference": evaluator.reference.info(),
        "generated": generated,
        "reconstruction": reconstruction,
        "notes": evaluator.notes(count) + (reconstruction["notes"] if reconstruction else []),
        "seconds": {"opening": opened, "all": time.perf_counter() - start},
        **machine_info(model.network.device, ranks),
    }
    if out is not None and ranks.main:
        report.save(result, grids, pairs, out)
    return ranks.broadcast(result)


def sampling_configs(model: TrainedUNITE, settings: EvaluationSettings) -> list[SamplingConfig]:
    """One per guidance scale."""
    recipe = model.config.sampling
    # Without duplicates: the recipe itself may be unguided.
    scales = dict.fromkeys(settings.guidance or (1.0, recipe.guidance))
    return [recipe.changed(**settings.sampling, guidance=scale) for scale in scales]


def make_generations(
    model: TrainedUNITE, configs: list[SamplingConfig], settings: EvaluationSettings, count: int
) -> list[Generation]:
    """One generation per config, all with the same noise; labels cycle, so classes are balanced."""
    precision, compile = model.precision_and_compile(settings.precision, settings.compile)
    return [
        Generation(
            torch.arange(count) % model.config.model.num_classes,
            sampling,
            settings.seed,
            min(settings.batch, count),
            precision,
            compile,
        )
        for sampling in configs
    ]


def _evaluate_reconstructions(
    model: TrainedUNITE, settings: EvaluationSettings, evaluator: Evaluator, ranks: Ranks, track: Track
) -> tuple[dict | None, tuple[Tensor, Tensor] | None]:
    """Scores and pairs of `score_reconstructions`; None if no reconstructions are asked for."""
    if not settings.reconstructions:
        return None, None
    try:
        source, kind = open_held_out_images(model.config, settings.data)
    except ClassesDiffer:
        raise
    except UserError as error:
        raise UserError(f"{error}; name held-out images with --data FOLDER, or give --reconstructions 0") from error
    if evaluator.classifier is not None:
        check_same_classes(source.class_names, evaluator.class_names, f"the {kind}", "the data of the classifier")
    return score_reconstructions(model, source, evaluator, settings, ranks, track, kind)


def _evaluate_generation(
    model: TrainedUNITE, generation: Generation, evaluator: Evaluator, ranks: Ranks, track: Track
) -> tuple[dict, Tensor]:
    """Settings and scores of the generated images, and the first images, uint8 [n, 3, S, S]."""
    start, first, count = time.perf_counter(), FirstImages(GRID), len(generation.labels)
    batches = sample_distributed(model.network, generation, ranks)
    rounds = -(-generation.batches // ranks.world)
    batches = track(batches, rounds, f"generating with guidance {generation.sampling.guidance:g}")
    scores = evaluator.score(first.watch(batches), count, ranks)
    entry = {
        **sampling_info(generation.sampling),
        **{name: getattr(generation, name) for name in ("seed", "batch", "compile")},
        "network_precision": generation.precision,  # "precision" is a score
        "count": count,
        **scores,
        "seconds": time.perf_counter() - start,
    }
    return entry, first.gather(ranks)


class FirstImages:
    """Collects the first `count` images of a series that several ranks generate."""

    def __init__(self, count: int):
        self.count = count
        self.images: dict[int, Tensor] = {}

    def watch(self, batches: Iterable[Samples]) -> Iterator[Samples]:
        """Pass the batches on and copy their first images."""
        for batch in batches:
            for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
                if index < self.count:
                    self.images[index] = image.clone()
            yield batch

    def gather(self, ranks: Ranks) -> Tensor:
        """uint8 [n, 3, S, S] in order, on every rank."""
        images = {index: image for part in ranks.gather(self.images) for index, image in part.items()}
        return torch.stack([image for _, image in sorted(images.items())])
