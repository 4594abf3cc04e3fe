"""Evaluate a model of molecules: generated ones, and reconstructions of held-out ones, beside the true molecules."""

import time
from pathlib import Path

import numpy as np
import torch

from unite_fast.config import Config
from unite_fast.data_pipeline.molecules.molecule_set import TRAIN, MoleculeSet
from unite_fast.data_pipeline.molecules.of_config import molecules_of
from unite_fast.data_pipeline.molecules.set_file import read_set
from unite_fast.data_pipeline.molecules.source import MoleculeSource
from unite_fast.data_pipeline.splits import NoSplit
from unite_fast.distributed.process_group import Ranks, current_ranks
from unite_fast.errors import require
from unite_fast.evaluation.batches import HELD_OUT, TRAINING, check_named
from unite_fast.evaluation.molecules import report
from unite_fast.evaluation.molecules.perception import rdkit
from unite_fast.evaluation.molecules.scores import generation_scores, reconstruction_scores
from unite_fast.evaluation.provenance import checkpoint_info, machine_info, sampling_info
from unite_fast.evaluation.settings import EvaluationSettings
from unite_fast.sampling.distributed_sampler import Generation, sample_distributed
from unite_fast.sampling.molecules import TrainedMolecules, unpack
from unite_fast.utils.progress import Track, no_progress

SAMPLES = 1_000
"""Generated molecules by default; published numbers are of 10,000."""
SHOWN = 32
"""Molecules in a picture."""


def evaluate_molecules(
    model: TrainedMolecules,
    settings: EvaluationSettings,
    out: Path | None = None,
    checkpoint: str = "",
    track: Track = no_progress,
) -> dict:
    """Score generated and reconstructed molecules. All ranks sample together; rank 0 scores and writes.

    Args:
        settings: of these `data`, `count`, `sampling`, `seed`, `batch`, `precision`, `compile`, `reconstructions`.
        out: folder for evaluation.json, evaluation.md and pictures; None: write nothing.
        checkpoint: path of the model, for the JSON.

    Returns:
        The content of evaluation.json: `reconstruction`, `generated` and `true` hold the scores of `scores.py`.

    Raises:
        UserError: the data are missing or do not fit; settings out of range; RDKit is not installed.
    """
    started_at, ranks = time.perf_counter(), current_ranks()
    check_of_molecules(settings)
    rdkit("Chem")  # before the work
    config = model.sampling_config(**settings.sampling)
    source, kind = open_true_molecules(model.config, settings.data)
    truth = source.molecules
    count = settings.count or SAMPLES
    generation = Generation(
        model.draw_sizes(count, settings.seed),
        config,
        settings.seed,
        min(settings.batch, count),
        *model.precision_and_compile(settings.precision or None, settings.compile),
    )
    generated = generate(model, generation, ranks, track)
    result: dict = {}
    if ranks.main:
        # In the order of a permutation: QM9's file is sorted by size.
        order = np.random.RandomState(0).permutation(len(truth))
        rebuilt = truth.take(order[: settings.reconstructions])
        reconstruction, copies = None, None
        if len(rebuilt):
            copies = model.reconstruct(rebuilt, settings.seed, settings.batch)
            reconstruction = {"kind": kind, **reconstruction_scores(rebuilt, copies, track)}
        known = training_inchi(model.config, settings.data)
        result = {
            "checkpoint": checkpoint_info(model, checkpoint),
            "reconstruction": reconstruction,
            "generated": {**sampling_info(config), "seed": settings.seed, **generation_scores(generated, known, track)},
            "true": {"kind": kind, **generation_scores(truth.take(order[:count]), known, track)},
            "seconds": time.perf_counter() - started_at,
            **machine_info(model.network.device, ranks),
        }
        if out is not None:
            pairs = None if copies is None else (rebuilt.take(range(min(SHOWN, len(rebuilt)))), copies)
            report.save(result, generated.take(range(min(SHOWN, count))), pairs, out)
    return ranks.broadcast(result)


def check_of_molecules(settings: EvaluationSettings) -> None:
    """
    Raises:
        UserError: a setting that only images have.
    """
    of_images = {
        "--guidance": bool(settings.guidance),
        "--features": settings.features != "auto",
        "--inception": bool(settings.inception),
        "--reference": bool(settings.reference),
    }
    for option, given in of_images.items():
        require(not given, f"{option} is for images, and this is a model of molecules; leave it out")


def open_true_molecules(config: Config, data: str) -> tuple[MoleculeSource, str]:
    """Held-out molecules (test, or else validation), or training molecules if there are none; and what they are."""
    if not data:
        check_named(config)
    try:
        return molecules_of(config, "test", data), HELD_OUT
    except NoSplit:
        return molecules_of(config, "train", data), TRAINING


def training_inchi(config: Config, data: str) -> list[str] | None:
    """InChI of all training molecules, those with more heavy atoms included; None if the set has none."""
    if not (data or config.data.path):
        return None
    molecules = read_set(data or config.data.path)
    if not molecules.inchi:
        return None
    return [molecules.inchi[row] for row in np.flatnonzero(molecules.split == TRAIN)]


def generate(model: TrainedMolecules, generation: Generation, ranks: Ranks, track: Track) -> MoleculeSet:
    """All molecules of a generation, on rank 0."""
    rounds = -(-generation.batches // ranks.world)
    batches = sample_distributed(model.network, generation, ranks)
    own = [(samples.indices, samples.images) for samples in track(batches, rounds, "generating")]
    parts = [part for each in ranks.gather(own) for part in each]
    atoms = torch.cat([atoms for _, atoms in parts])
    order = torch.cat([indices for indices, _ in parts]).argsort()
    return unpack(atoms[order], generation.labels, model.symbols)
