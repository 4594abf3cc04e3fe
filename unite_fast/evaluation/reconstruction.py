"""Reconstruction metrics on real images."""

import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from unite_fast.checkpoint.format import places_of
from unite_fast.config import PerceptualConfig
from unite_fast.data_pipeline import Source
from unite_fast.distributed.process_group import Ranks
from unite_fast.evaluation import metrics
from unite_fast.evaluation.batches import HELD_OUT, read_batches, unreadable_info
from unite_fast.evaluation.evaluator import Evaluator, bias_warning
from unite_fast.evaluation.fid import Moments, frechet_distance
from unite_fast.evaluation.reference import check_unreadable
from unite_fast.evaluation.settings import EvaluationSettings
from unite_fast.lpips import LPIPS, LPIPS_FILE, SMALLEST_SIDE, VGG_FILE, load_lpips
from unite_fast.sampling.pipeline import TrainedUNITE
from unite_fast.utils.device import exact_float32
from unite_fast.utils.progress import Track

LPIPS_BATCH = 16
"""Images per forward pass: VGG16's features of 256 x 256 images dominate memory here."""
PAIRS = 30
"""Pairs in the grid that is saved with a result."""
_SCORES = ("psnr", "mean_squared_error", "l1", "ssim", "lpips")


def score_reconstructions(
    model: TrainedUNITE,
    source: Source,
    evaluator: Evaluator,
    settings: EvaluationSettings,
    ranks: Ranks,
    track: Track,
    kind: str = HELD_OUT,
) -> tuple[dict, tuple[Tensor, Tensor]]:
    """Score reconstructions of `settings.reconstructions` images, evenly spaced over the source, or of all if it has
    fewer. The registers of image i are drawn from (seed, i).

    Args:
        kind: what the images are, see `open_held_out_images`.

    Returns:
        A dict for the JSON and pairs for a grid. The dict has means over the images: `psnr` and `psnr_of_mean_error`
        (dB), `l1`, `ssim`, `lpips`; the `frechet_distance` between originals and reconstructions in the evaluator's
        features (rFID with Inception); `real_class_agreement` and `class_agreement` of originals and reconstructions.
        Values that cannot be computed are None, and `notes` says why; it also warns if the images are too few for the
        distance. The pairs are originals and reconstructions, uint8 [p, 3, S, S] each.

    Raises:
        UserError: too many unreadable images.
    """
    start = time.perf_counter()
    count = min(len(source), settings.reconstructions)
    indices = np.linspace(0, len(source) - 1, count).round().astype(int).tolist()
    lpips, notes = _load_lpips(model.config.perceptual, source.image_size, model.network.device)
    named = [path for key, path in places_of(model.config).items() if key.startswith("perceptual.")]
    if lpips is None and named and source.image_size >= SMALLEST_SIDE:
        notes.append(
            f"the model's settings name weights of LPIPS, {', '.join(map(repr, named))}: set the variable there"
        )
    if source.image_size < metrics.SSIM_WINDOW:
        notes.append(f"no SSIM: it needs images of at least {metrics.SSIM_WINDOW} pixels")

    real, rebuilt = (Moments(evaluator.features.dimension, evaluator.features.device) for _ in range(2))
    sums = torch.zeros(len(_SCORES), dtype=torch.float64)
    correct = torch.zeros(2, dtype=torch.float64)
    unreadable: list[str] = []
    pairs: tuple[Tensor, Tensor] | None = None
    batches = list(ranks.batches(count, settings.batch))
    reads = read_batches(source, [indices[batch.start : batch.stop] for batch in batches], model.config.data.workers)
    for batch, read in zip(batches, track(reads, len(batches), "reconstructing"), strict=True):
        unreadable += read.unreadable
        if not len(read.images):
            continue
        # Without this, convolutions on CUDA use TF32 and the result is not float32.
        with exact_float32():
            copies = model.reconstruct(read.images, settings.seed, settings.batch, first=batch.start)
            on_device = read.images.to(evaluator.features.device), copies.to(evaluator.features.device)
            sums += _sums(*on_device, lpips)
        real.update(evaluator.features(on_device[0]).pool)
        rebuilt.update(evaluator.features(on_device[1]).pool)
        if evaluator.classifier is not None:
            count_correct = evaluator.classifier.count_correct
            correct += torch.tensor([count_correct(images, read.labels) for images in (read.images, copies)])
        pairs = pairs or (read.images[:PAIRS].clone(), copies[:PAIRS].clone())
    unreadable = [name for part in ranks.gather(unreadable) for name in part]
    check_unreadable(unreadable, count)
    for moments in (real, rebuilt):
        moments.all_reduce(ranks)
    n = int(real.count)
    warning = bias_warning(n, evaluator.features.dimension, kind.removesuffix(" images"))
    notes += [warning] if warning else []
    mean = dict(zip(_SCORES, (ranks.sum(sums) / n).tolist(), strict=True))
    agreement = (ranks.sum(correct) / n).tolist() if evaluator.classifier is not None else (None, None)
    distance = frechet_distance(rebuilt.statistics(), real.statistics()) if ranks.main else None
    result = {
        "images": n,
        "kind": kind,
        "split": source.split,
        "left_out": list(source.left_out),
        **unreadable_info(unreadable),
        "seed": settings.seed,
        "network_precision": "float32",
        "frechet_distance": ranks.broadcast(distance),
        "psnr": mean["psnr"],
        "psnr_of_mean_error": float(metrics.decibels(torch.tensor(mean["mean_squared_error"], dtype=torch.float64))),
        "l1": mean["l1"],
        "ssim": mean["ssim"] if source.image_size >= metrics.SSIM_WINDOW else None,
        "lpips": mean["lpips"] if lpips is not None else None,
        "lpips_input": "[-1, 1], as LPIPS is defined" if lpips is not None else None,
        "real_class_agreement": agreement[0],
        "class_agreement": agreement[1],
        "notes": notes,
        "seconds": time.perf_counter() - start,
    }
    return result, next(part for part in ranks.gather(pairs) if part is not None)


def _sums(originals: Tensor, copies: Tensor, lpips: LPIPS | None) -> Tensor:
    """Sum of each of `_SCORES` over a batch: float64 [5]; 0 for scores that are not computed."""
    # Count an equal copy as one level off in one value: its infinite PSNR would make the mean infinite.
    smallest = 1 / (255**2 * originals[0].numel())
    error = metrics.mean_squared_error(originals, copies).clamp(min=smallest)
    zeros = torch.zeros_like(error)
    each = (
        metrics.decibels(error),
        error,
        metrics.l1(originals, copies),
        metrics.ssim(originals, copies) if originals.shape[-1] >= metrics.SSIM_WINDOW else zeros,
        _lpips_distances(lpips, originals, copies) if lpips is not None else zeros,
    )
    return torch.stack(each).sum(dim=1).cpu()


def _lpips_distances(lpips: LPIPS, originals: Tensor, copies: Tensor) -> Tensor:
    """uint8 [n, 3, S, S] each -> float64 [n]."""
    parts = zip(originals.split(LPIPS_BATCH), copies.split(LPIPS_BATCH), strict=True)
    return torch.cat([lpips(*(images.float() / 255 for images in pair)).double() for pair in parts])


def _load_lpips(config: PerceptualConfig, size: int, device: torch.device) -> tuple[LPIPS | None, list[str]]:
    """LPIPS, or None with a note if its weight files are missing. Unlike in training, images enter in [-1, 1]."""
    if size < SMALLEST_SIDE:
        return None, [f"no LPIPS: VGG16 needs images of {SMALLEST_SIDE} pixels or more"]
    files = ((VGG_FILE, config.vgg_path), (LPIPS_FILE, config.lpips_path))
    missing = [origin for file, path in files if (origin := file.missing(path))]
    if missing:
        return None, [f"no LPIPS: there is no weight file at {' and '.join(missing)}"]
    return load_lpips(replace(config, input_range="signed")).to(device), []
