"""How well held-out images come back through tokenizer and decoder."""

import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unite_fast.config import EvaluationSettings, PerceptualConfig
from unite_fast.data_pipeline import Source
from unite_fast.distributed.process_group import Ranks
from unite_fast.evaluation import metrics
from unite_fast.evaluation.batches import read_batches, unreadable
from unite_fast.evaluation.evaluator import Judge, bias_warning
from unite_fast.evaluation.fid import Moments, frechet_distance
from unite_fast.evaluation.reference import check_broken
from unite_fast.lpips import LPIPS, SMALLEST_SIDE, load_lpips
from unite_fast.sampling.pipeline import TrainedUNITE
from unite_fast.utils.device import exact_float32
from unite_fast.utils.progress import Track

LPIPS_BATCH = 16
"""Images at a time: VGG16's features of 256 x 256 pixels are the largest thing here."""
PAIRS = 30
"""Pairs in the picture beside a result."""
_SCORES = ("psnr", "mean_squared_error", "l1", "ssim", "lpips")


def score_reconstructions(
    model: TrainedUNITE, source: Source, judge: Judge, settings: EvaluationSettings, ranks: Ranks, track: Track
) -> tuple[dict, tuple[Tensor, Tensor]]:
    """Scores of the reconstructions of `settings.reconstructions` images, spread over the source, or of all there are.

    Image i of them has its registers drawn from (seed, i).

    Returns:
        Means over the images: `psnr` and `psnr_of_mean_error` (dB), `l1`, `ssim`, `lpips`; `frechet_distance` between
        originals and reconstructions in the judge's features (rFID with Inception); `real_class_agreement` and
        `class_agreement`, of originals and of reconstructions. None where something could not be computed; `notes`
        says why, and whether the images are too few for the distance. Then originals and reconstructions,
        uint8 [p, 3, S, S] each.

    Raises:
        UserError: too many images that cannot be read.
    """
    begun = time.perf_counter()
    count = min(len(source), settings.reconstructions)
    chosen = np.linspace(0, len(source) - 1, count).round().astype(int).tolist()
    lpips, notes = _lpips(model.config.perceptual, source.image_size, model.network.device)
    if source.image_size < metrics.SSIM_WINDOW:
        notes.append(f"no SSIM: its window of {metrics.SSIM_WINDOW} pixels is larger than the images")

    real, rebuilt = (Moments(judge.features.dimension, judge.features.device) for _ in range(2))
    sums = torch.zeros(len(_SCORES), dtype=torch.float64)
    right = torch.zeros(2, dtype=torch.float64)
    broken: list[str] = []
    pairs: tuple[Tensor, Tensor] | None = None
    batches = list(ranks.batches(count, settings.batch))
    reads = read_batches(source, [chosen[batch.start : batch.stop] for batch in batches], model.config.data.workers)
    for batch, read in zip(batches, track(reads, len(batches), "reconstructing"), strict=True):
        broken += read.broken
        if not len(read.images):
            continue
        # PyTorch lets convolutions on CUDA drop to TF32, and the result says float32.
        with exact_float32():
            copies = model.reconstruct(read.images, settings.seed, settings.batch, first=batch.start)
            on_device = read.images.to(judge.features.device), copies.to(judge.features.device)
            sums += _sums(*on_device, lpips)
        real.update(judge.features(on_device[0]).pool)
        rebuilt.update(judge.features(on_device[1]).pool)
        if judge.classifier is not None:
            right += torch.tensor([judge.classifier.right(images, read.labels) for images in (read.images, copies)])
        pairs = pairs or (read.images[:PAIRS].clone(), copies[:PAIRS].clone())
    broken = [name for part in ranks.gather(broken) for name in part]
    check_broken(broken, count)
    for moments in (real, rebuilt):
        moments.all_reduce(ranks)
    n = int(real.count)
    too_few = bias_warning(n, judge.features.dimension, "held-out")
    notes += [too_few] if too_few else []
    mean = dict(zip(_SCORES, (ranks.sum(sums) / n).tolist(), strict=True))
    real_right, rebuilt_right = (ranks.sum(right) / n).tolist() if judge.classifier is not None else (None, None)
    distance = frechet_distance(rebuilt.statistics(), real.statistics()) if ranks.main else None
    result = {
        "images": n,
        **unreadable(broken),
        "seed": settings.seed,
        "network_precision": "float32",
        "frechet_distance": ranks.broadcast(distance),
        "psnr": mean["psnr"],
        "psnr_of_mean_error": float(metrics.decibels(torch.tensor(mean["mean_squared_error"], dtype=torch.float64))),
        "l1": mean["l1"],
        "ssim": mean["ssim"] if source.image_size >= metrics.SSIM_WINDOW else None,
        "lpips": mean["lpips"] if lpips is not None else None,
        "lpips_input": "[-1, 1], as LPIPS is defined" if lpips is not None else None,
        "real_class_agreement": real_right,
        "class_agreement": rebuilt_right,
        "notes": notes,
        "seconds": time.perf_counter() - begun,
    }
    return result, next(part for part in ranks.gather(pairs) if part is not None)


def _sums(originals: Tensor, copies: Tensor, lpips: LPIPS | None) -> Tensor:
    """Over the images of a batch, of each of `_SCORES`: float64 [5]; 0 for what is not computed."""
    # An equal copy counts as one level off in one value, or its infinite PSNR would be the mean.
    smallest = 1 / (255**2 * originals[0].numel())
    error = metrics.mean_squared_error(originals, copies).clamp(min=smallest)
    none = torch.zeros_like(error)
    each = (
        metrics.decibels(error),
        error,
        metrics.l1(originals, copies),
        metrics.ssim(originals, copies) if originals.shape[-1] >= metrics.SSIM_WINDOW else none,
        _lpips_of(lpips, originals, copies) if lpips is not None else none,
    )
    return torch.stack(each).sum(dim=1).cpu()


def _lpips_of(lpips: LPIPS, originals: Tensor, copies: Tensor) -> Tensor:
    """uint8 [n, 3, S, S] each -> float64 [n]."""
    parts = zip(originals.split(LPIPS_BATCH), copies.split(LPIPS_BATCH), strict=True)
    return torch.cat([lpips(*(images.float() / 255 for images in pair)).double() for pair in parts])


def _lpips(config: PerceptualConfig, size: int, device: torch.device) -> tuple[LPIPS | None, list[str]]:
    """LPIPS if its two files are there, or why not. Not the distance that trains: images go in as [-1, 1]."""
    if size < SMALLEST_SIDE:
        return None, [f"no LPIPS: VGG16 needs images of {SMALLEST_SIDE} pixels or more"]
    paths = {
        "UNITE_FAST_VGG16": config.vgg_path or os.environ.get("UNITE_FAST_VGG16"),
        "UNITE_FAST_LPIPS": config.lpips_path or os.environ.get("UNITE_FAST_LPIPS"),
    }
    missing = [name for name, path in paths.items() if not path or not Path(path).expanduser().is_file()]
    if missing:
        return None, [f"no LPIPS: no file of its weights under {' and '.join(missing)} (environment variables)"]
    digests = {"vgg_sha256": config.vgg_sha256, "lpips_sha256": config.lpips_sha256}
    return load_lpips(PerceptualConfig(1.0, *paths.values(), **digests, input_range="signed")).to(device), []
