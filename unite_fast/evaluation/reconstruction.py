"""How well held-out images come back through tokenizer and decoder."""

import os
import time
from pathlib import Path

import torch
from torch import Tensor

from unite_fast.data_pipeline import Source
from unite_fast.evaluation import scores
from unite_fast.evaluation.judge import Judge
from unite_fast.evaluation.ranks import Ranks
from unite_fast.evaluation.reading import Shown, read_batches
from unite_fast.evaluation.reference import check_broken
from unite_fast.evaluation.settings import EvaluationSettings
from unite_fast.evaluation.statistics import Moments, frechet_distance
from unite_fast.perceptual import LPIPS, SMALLEST_SIDE, PerceptualConfig, load_lpips
from unite_fast.trained import TrainedUNITE

PAIRS = 30
"""Pairs in the picture beside a result."""
_SUMS = ("images", "psnr", "mean_squared_error", "l1", "ssim", "lpips", "real_right", "right")


def score_reconstructions(
    model: TrainedUNITE, source: Source, judge: Judge, settings: EvaluationSettings, ranks: Ranks, shown: Shown
) -> tuple[dict, tuple[Tensor, Tensor]]:
    """Scores of the reconstructions of a source's first `settings.reconstructions` images, and some pairs.

    Image i's registers are drawn from (seed, i). An image that comes back without error counts as one level off in one
    value, since its PSNR is infinite.

    Returns:
        Means over the images: `psnr` and `psnr_of_mean_error` (dB), `l1`, `ssim`, `lpips`; `frechet_distance` between
        originals and reconstructions in the judge's features (rFID with Inception); `real_class_agreement` and
        `class_agreement`, of originals and of reconstructions. None where something could not be computed, and
        `notes` says why. Then originals and reconstructions, uint8 [p, 3, S, S] each.

    Raises:
        UserError: too many images that cannot be read.
    """
    begun, size = time.perf_counter(), source.image_size
    count = min(len(source), settings.reconstructions)
    lpips, why_no_lpips = _lpips(model.config.perceptual, size, model.network.device)
    see_structure = size >= scores.SSIM_WINDOW
    sums = torch.zeros(len(_SUMS), dtype=torch.float64)
    device = judge.features.device
    moments = [Moments(judge.features.dimension, device) for _ in range(2)]
    broken: list[str] = []
    pairs: tuple[Tensor, Tensor] | None = None
    batches = list(ranks.batches(count, settings.batch))
    reads = read_batches(source, batches, model.config.data.workers)
    for batch, read in zip(batches, shown(reads, len(batches), "reconstructing"), strict=True):
        broken += read.broken
        originals = read.images
        if not len(originals):
            continue
        copies = model.reconstruct(originals, settings.seed, settings.batch, first=batch.start)
        if pairs is None:
            pairs = originals[:PAIRS].clone(), copies[:PAIRS].clone()
        for total, images in zip(moments, (originals, copies), strict=True):
            total.update(judge.features(images.to(device)).pool)
        error = scores.mean_squared_error(originals, copies).clamp(min=1 / (3 * size * size * 255**2))
        found = {
            "images": torch.ones(len(originals), dtype=torch.float64),
            "psnr": scores.decibels(error),
            "mean_squared_error": error,
            "l1": scores.l1(originals, copies),
        }
        if see_structure:
            found["ssim"] = scores.ssim(originals, copies)
        if lpips is not None:
            on_device = (images.to(model.network.device).float() / 255 for images in (originals, copies))
            with torch.no_grad():
                found["lpips"] = lpips(*on_device).double().cpu()
        for name, values in found.items():
            sums[_SUMS.index(name)] += values.sum()
        if judge.classifier is not None:
            sums[_SUMS.index("real_right")] += judge.classifier.right(originals, read.labels)
            sums[_SUMS.index("right")] += judge.classifier.right(copies, read.labels)
    ranks.sum(sums)
    for total in moments:
        total.all_reduce(ranks)
    broken = [name for part in ranks.gather(broken) for name in part]
    check_broken(broken, count)

    total = dict(zip(_SUMS, sums.tolist(), strict=True))
    mean = {name: total[name] / total["images"] for name in _SUMS}
    distance = frechet_distance(*(one.statistics() for one in moments)) if ranks.first else None
    notes = [] if see_structure else [f"no SSIM: its window of {scores.SSIM_WINDOW} pixels is larger than the images"]
    judged = judge.classifier is not None
    result = {
        "images": int(total["images"]),
        "unreadable": len(broken),
        "seed": settings.seed,
        "network_precision": "float32",
        "frechet_distance": ranks.from_first(distance),
        "psnr": mean["psnr"],
        "psnr_of_mean_error": float(scores.decibels(torch.tensor(mean["mean_squared_error"]))),
        "l1": mean["l1"],
        "ssim": mean["ssim"] if see_structure else None,
        "lpips": mean["lpips"] if lpips is not None else None,
        "lpips_input": "[-1, 1], as LPIPS is defined" if lpips is not None else None,
        "real_class_agreement": mean["real_right"] if judged else None,
        "class_agreement": mean["right"] if judged else None,
        "notes": notes + ([why_no_lpips] if why_no_lpips else []),
        "seconds": time.perf_counter() - begun,
    }
    return result, next(part for part in ranks.gather(pairs) if part is not None)


def _lpips(config: PerceptualConfig, size: int, device: torch.device) -> tuple[LPIPS | None, str]:
    """LPIPS if its two files are there, or why not. Not the distance that trains: images go in as [-1, 1]."""
    if size < SMALLEST_SIDE:
        return None, f"no LPIPS: VGG16 needs images of {SMALLEST_SIDE} pixels or more"
    paths = {
        "UNITE_FAST_VGG16": os.environ.get("UNITE_FAST_VGG16") or config.vgg_path,
        "UNITE_FAST_LPIPS": os.environ.get("UNITE_FAST_LPIPS") or config.lpips_path,
    }
    missing = [name for name, path in paths.items() if not path or not Path(path).expanduser().is_file()]
    if missing:
        return None, f"no LPIPS: no file of its weights under {' and '.join(missing)} (environment variables)"
    asked = PerceptualConfig(
        1.0,
        *paths.values(),
        vgg_sha256=config.vgg_sha256,
        lpips_sha256=config.lpips_sha256,
        input_range="signed",
    )
    return load_lpips(asked).to(device), ""
