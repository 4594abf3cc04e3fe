"""The evaluation of a trained model: generated images against real ones, reconstructions against their originals."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from unite_fast.config import EVALUATION_SAMPLES, EvaluationSettings, SamplingConfig
from unite_fast.distributed.process_group import Ranks, current_ranks
from unite_fast.errors import UserError
from unite_fast.evaluation import report
from unite_fast.evaluation.batches import open_named
from unite_fast.evaluation.evaluator import open_judge
from unite_fast.evaluation.provenance import described_checkpoint, described_machine, described_sampling
from unite_fast.evaluation.reconstruction import score_reconstructions
from unite_fast.sampling.distributed_sampler import Generation, Samples, sample_distributed
from unite_fast.sampling.pipeline import TrainedUNITE
from unite_fast.utils.progress import Track, no_progress

GRID = 80
"""Generated images in the picture beside a result."""


def evaluate(
    model: TrainedUNITE,
    settings: EvaluationSettings,
    out: Path | None = None,
    checkpoint: str = "",
    track: Track = no_progress,
) -> dict:
    """Reconstruct, score, generate, score. Processes of an initialised `torch.distributed` share the work.

    Args:
        model: on the device that shall do the work.
        out: folder for evaluation.json, evaluation.md and the grids, written by rank 0; None: nothing is written.
        checkpoint: where the model comes from, for the JSON.
        track: shows progress; see `utils.progress`.

    Returns:
        What evaluation.json holds, the same on every process. `generated` is a list, one entry a guidance scale.

    Raises:
        UserError: data, weights or statistics that are missing or do not fit; settings out of range.
    """
    if out is not None:
        report.check_folder(out)
    begun, ranks = time.perf_counter(), current_ranks()
    wanted = samplings(model, settings)  # first, since it costs nothing and may be refused
    judge = open_judge(model.config, settings, ranks, model.network.device, track)
    count = settings.count or EVALUATION_SAMPLES[judge.features.name]
    series = planned(model, wanted, settings, count)
    opened = time.perf_counter() - begun
    # First, since it is short and what may be missing for it should not show after hours of generating.
    reconstruction, pairs = None, None
    if settings.reconstructions:
        try:
            source = open_named(model.config, settings.data, "test")
        except UserError as error:
            raise UserError(
                f"{error}; name held-out images with --data FOLDER, or give --reconstructions 0 to do without"
            ) from error
        reconstruction, pairs = score_reconstructions(model, source, judge, settings, ranks, track)
    generated, pictures = [], {}
    for generation in series:
        begun_here, first, scale = time.perf_counter(), FirstImages(GRID), generation.sampling.guidance
        batches = sample_distributed(model.network, generation, ranks)
        total = -(-generation.batches // ranks.world)
        scores = judge.score(first.watch(track(batches, total, f"generating with guidance {scale:g}")), count, ranks)
        generated.append(
            {
                **described_sampling(generation.sampling),
                **{name: getattr(generation, name) for name in ("seed", "batch", "compile")},
                "network_precision": generation.precision,  # "precision" is a score
                "count": count,
                **scores,
                "seconds": time.perf_counter() - begun_here,
            }
        )
        pictures[f"samples_guidance_{scale:g}.png"] = first.gathered(ranks)
    result = {
        "checkpoint": described_checkpoint(model, checkpoint),
        "features": {
            "name": judge.features.name,
            "title": judge.features.title,
            "dimension": judge.features.dimension,
            **judge.features.source,
        },
        "reference": judge.reference.described(),
        "generated": generated,
        "reconstruction": reconstruction,
        "notes": judge.notes(count) + (reconstruction["notes"] if reconstruction else []),
        "seconds": {"opening": opened, "all": time.perf_counter() - begun},
        **described_machine(model.network.device, ranks),
    }
    if out is not None and ranks.main:
        report.save(result, pictures, pairs, out)
    return ranks.broadcast(result)


def samplings(model: TrainedUNITE, settings: EvaluationSettings) -> list[SamplingConfig]:
    """One for each guidance scale."""
    recipe = model.config.sampling
    # In order and each once: a recipe may itself be unguided.
    scales = dict.fromkeys(settings.guidance or (1.0, recipe.guidance))
    return [recipe.changed(**settings.sampling, guidance=scale) for scale in scales]


def planned(
    model: TrainedUNITE, wanted: list[SamplingConfig], settings: EvaluationSettings, count: int
) -> list[Generation]:
    """What is generated, each time of the same noise: classes in turn, so as many of each."""
    on_gpu = model.network.device.type == "cuda"
    return [
        Generation(
            torch.arange(count) % model.config.model.num_classes,
            sampling,
            settings.seed,
            min(settings.batch, count),
            settings.precision or model.config.train.precision,
            on_gpu if settings.compile is None else settings.compile,
        )
        for sampling in wanted
    ]


class FirstImages:
    """Keeps the first so many images of a series that several processes make."""

    def __init__(self, most: int):
        self.most = most
        self.kept: dict[int, Tensor] = {}

    def watch(self, batches: Iterable[Samples]) -> Iterator[Samples]:
        for batch in batches:
            for number, image in zip(batch.indices.tolist(), batch.images, strict=True):
                if number < self.most:
                    self.kept[number] = image.clone()
            yield batch

    def gathered(self, ranks: Ranks) -> Tensor:
        together = {number: image for part in ranks.gather(self.kept) for number, image in part.items()}
        return torch.stack([image for _, image in sorted(together.items())])
