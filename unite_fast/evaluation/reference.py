"""Statistics of real images, made batch by batch, and which samples' features are kept one by one."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from unite_fast.config import EvaluationSettings
from unite_fast.data_pipeline import Source
from unite_fast.data_pipeline.open_source import detect_source, open_source
from unite_fast.data_pipeline.readers import check_broken_fraction
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import require
from unite_fast.evaluation import metrics, pixel_features
from unite_fast.evaluation.batches import NumberedBatch, read_batches, unreadable
from unite_fast.evaluation.features import Features
from unite_fast.evaluation.fid import Moments, Reference, save_reference
from unite_fast.evaluation.inception import load_inception
from unite_fast.evaluation.pixel_features import PixelFeatures, fit_pixels_once
from unite_fast.randomness import permutation
from unite_fast.utils.files import check_target
from unite_fast.utils.progress import Track, no_progress

KEPT = 10_000
"""Images of each side whose features are kept one by one, for KID, precision and recall; the others only enter sums."""


class Mixed:
    """A fixed random place for each of `count` numbered samples. The split of the Inception Score that it is in, and
    whether its features are kept, follow from its number alone, not from classes that come in turn nor processes."""

    def __init__(self, count: int):
        self.count = count
        self._places = torch.empty(count, dtype=torch.int64)
        self._places[permutation(0, 0, count)] = torch.arange(count)

    def places(self, indices: Tensor) -> Tensor:
        return self._places[indices]

    def splits(self, indices: Tensor) -> Tensor:
        return self.places(indices) * metrics.SPLITS // self.count


class Kept:
    """The features of the samples that come first in the mixed order, wherever they were computed."""

    def __init__(self, mixed: Mixed, most: int = KEPT):
        self.mixed, self.most = mixed, most
        self._places: list[Tensor] = []
        self._features: list[Tensor] = []

    def update(self, indices: Tensor, features: Tensor) -> None:
        places = self.mixed.places(indices)
        chosen = places < self.most
        self._places.append(places[chosen])
        self._features.append(features[chosen.to(features.device)].cpu())

    def gathered(self, ranks: Ranks) -> Tensor | None:
        """float32 [m, D] in the mixed order, on every process; None if there are none."""
        parts = [part for part in ranks.gather((self._places, self._features)) if part[0]]
        if not parts:
            return None
        places = torch.cat([place for part in parts for place in part[0]])
        features = torch.cat([feature for part in parts for feature in part[1]])
        return features[places.argsort()]


def make_reference(
    source: Source, features: Features, ranks: Ranks, batch: int, workers: int, track: Track = no_progress
) -> Reference:
    """Statistics of all images of a source that can be read.

    Args:
        track: shows progress; see `utils.progress`.

    Raises:
        UserError: fewer than two images, or many that cannot be read.
    """
    mixed = Mixed(len(source))
    moments, kept, fingerprint = Moments(features.dimension, features.device), Kept(mixed), 0
    broken: list[str] = []
    batches = list(ranks.batches(len(source), batch))
    for read in track(read_batches(source, batches, workers), len(batches), "reading real images"):
        broken += read.broken
        if not len(read.images):
            continue
        pool = features(read.images.to(features.device)).pool
        moments.update(pool)
        kept.update(read.indices, pool)
        fingerprint += fingerprint_of(read)
    moments.all_reduce(ranks)
    names = [name for part in ranks.gather(broken) for name in part]
    check_broken(names, len(source))
    count = int(moments.count)
    about = {
        "data_sha256": f"{sum(ranks.gather(fingerprint)) % 2**256:064x}",
        **unreadable(names),
        "image_size": source.image_size,
        "classes": len(source.class_names),
        "features_source": features.source,
    }
    basis = features.basis if isinstance(features, PixelFeatures) else {}
    return Reference(moments.statistics(), features.name, count, about, kept.gathered(ranks), basis)


def fingerprint_of(batch: NumberedBatch) -> int:
    """Sum over the samples of SHA-256(number, label, pixels) as a number: the same in any order."""
    digests = (
        hashlib.sha256(f"{number} {label} ".encode() + image.numpy().tobytes()).digest()
        for number, label, image in zip(batch.indices.tolist(), batch.labels.tolist(), batch.images, strict=True)
    )
    return sum(int.from_bytes(digest, "big") for digest in digests)


def check_broken(broken: list[str], total: int) -> None:
    """
    Raises:
        UserError: so many samples cannot be read that the result would be of other data.
    """
    if broken:
        name, _, reason = broken[-1].partition(": ")
        check_broken_fraction(len(broken), total, (name, reason))


def choose_features(settings: EvaluationSettings, image_size: int, of_inception: bool = False) -> str:
    if settings.features != "auto":
        return settings.features
    return (
        "inception"
        if settings.inception or of_inception or image_size > pixel_features.LARGEST
        else pixel_features.NAME
    )


def check_fit(reference: Reference, features: Features) -> None:
    """
    Raises:
        UserError: statistics of other features.
    """
    d = len(reference.statistics.mean)
    require(
        d == features.dimension and reference.features in ("", features.name),
        f"{reference.path} has statistics of {d} {reference.features or 'unnamed'} features, and {features.name} has "
        f"{features.dimension}: they cannot be compared; make a reference with --features {features.name}",
    )


def save_statistics(
    data: str,
    image_size: int,
    split: str,
    settings: EvaluationSettings,
    out: Path,
    ranks: Ranks,
    device: torch.device | str,
    workers: int = 2,
    track: Track = no_progress,
) -> Reference:
    """Statistics of all images of a data folder, written by rank 0.

    Args:
        data: folder or address of data, or "digits".
        image_size: side to which images are cropped; 0: what suits the data.

    Raises:
        UserError: data or weights that are missing, images too large for pixels, or a file that cannot be written.
    """
    check_target(out, (".npz",))
    kind, path = detect_source(data)
    source = open_source(kind, path, image_size, split)
    size = source.image_size
    if choose_features(settings, size) == pixel_features.NAME:
        require(
            size <= pixel_features.LARGEST,
            f"these images are {size} x {size}; features pixels are for sides up to {pixel_features.LARGEST}: "
            "use --features inception",
        )
        features: Features = fit_pixels_once(source, ranks, device)
    else:
        features = load_inception(settings.inception, settings.inception_sha256, device)
    made = make_reference(source, features, ranks, settings.batch, workers, track)
    made.about |= {"data": data, "source": kind, "split": split}
    if ranks.main:
        save_reference(made, out)
    return made
