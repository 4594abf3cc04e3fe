"""Reference statistics of real images, and the choice of images whose features are kept."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from unite_fast.data_pipeline import Source, detect_source, open_source
from unite_fast.data_pipeline.readers import check_broken_fraction
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import require
from unite_fast.evaluation import metrics, pixel_features
from unite_fast.evaluation.batches import NumberedBatch, read_batches, unreadable_info
from unite_fast.evaluation.features import Features
from unite_fast.evaluation.fid import Moments, Reference, save_reference
from unite_fast.evaluation.inception import load_inception
from unite_fast.evaluation.pixel_features import PixelFeatures, fit_pixels_on_main
from unite_fast.evaluation.settings import EvaluationSettings
from unite_fast.randomness import permutation
from unite_fast.utils.file_lock import lock_output
from unite_fast.utils.files import check_npz, check_target
from unite_fast.utils.progress import Track, no_progress

KEPT_SAMPLES = 10_000
"""Maximum number of generated images, and of real ones, whose features are kept for KID, precision and recall. Of the
others, only sums are kept."""


class SampleOrder:
    """A fixed random order of `count` samples. It decides which split of the Inception Score a sample belongs to and
    whether its features are kept, by its index alone: independent of cycling labels and of the ranks."""

    def __init__(self, count: int):
        self.count = count
        self._positions = torch.empty(count, dtype=torch.int64)
        self._positions[permutation(0, 0, count)] = torch.arange(count)

    def positions(self, indices: Tensor) -> Tensor:
        return self._positions[indices]

    def splits(self, indices: Tensor) -> Tensor:
        return self.positions(indices) * metrics.SPLITS // self.count


class KeptFeatures:
    """The features of the first `limit` samples in a `SampleOrder`, computed on any rank."""

    def __init__(self, order: SampleOrder, limit: int = KEPT_SAMPLES):
        self.order, self.limit = order, limit
        self._positions: list[Tensor] = []
        self._features: list[Tensor] = []

    def update(self, indices: Tensor, features: Tensor) -> None:
        positions = self.order.positions(indices)
        keep = positions < self.limit
        self._positions.append(positions[keep])
        self._features.append(features[keep.to(features.device)].cpu())

    def gather(self, ranks: Ranks) -> Tensor | None:
        """float32 [m, D] in the `SampleOrder`, on every rank; None if there are none."""
        parts = [part for part in ranks.gather((self._positions, self._features)) if part[0]]
        if not parts:
            return None
        positions = torch.cat([position for part in parts for position in part[0]])
        features = torch.cat([feature for part in parts for feature in part[1]])
        return features[positions.argsort()]


def make_reference(
    source: Source, features: Features, ranks: Ranks, batch: int, workers: int, track: Track = no_progress
) -> Reference:
    """Compute the statistics of all readable images of a source.

    Args:
        track: shows progress; see `utils.progress`.

    Raises:
        UserError: fewer than two images, or many unreadable ones.
    """
    moments, kept = Moments(features.dimension, features.device), KeptFeatures(SampleOrder(len(source)))
    digest, unreadable = 0, []
    batches = list(ranks.batches(len(source), batch))
    for read in track(read_batches(source, batches, workers), len(batches), "reading real images"):
        unreadable += read.unreadable
        if not len(read.images):
            continue
        pool = features(read.images.to(features.device)).pool
        moments.update(pool)
        kept.update(read.indices, pool)
        digest += fingerprint(read)
    moments.all_reduce(ranks)
    unreadable = [name for part in ranks.gather(unreadable) for name in part]
    check_unreadable(unreadable, len(source))
    provenance = {
        "data_sha256": f"{sum(ranks.gather(digest)) % 2**256:064x}",
        **unreadable_info(unreadable),
        "image_size": source.image_size,
        "classes": len(source.class_names),
        "features_source": features.source,
    }
    basis = features.basis if isinstance(features, PixelFeatures) else {}
    count = int(moments.count)
    return Reference(moments.statistics(), features.name, count, provenance, kept.gather(ranks), basis)


def fingerprint(batch: NumberedBatch) -> int:
    """Sum of SHA-256(index, label, pixels) over the samples, as an integer: independent of their order."""
    digests = (
        hashlib.sha256(f"{index} {label} ".encode() + image.numpy().tobytes()).digest()
        for index, label, image in zip(batch.indices.tolist(), batch.labels.tolist(), batch.images, strict=True)
    )
    return sum(int.from_bytes(digest, "big") for digest in digests)


def check_unreadable(unreadable: list[str], total: int) -> None:
    """Check that only a small share of the samples is unreadable.

    Raises:
        UserError: too many samples are unreadable.
    """
    if unreadable:
        name, _, reason = unreadable[-1].partition(": ")
        check_broken_fraction(len(unreadable), total, (name, reason))


def choose_features(settings: EvaluationSettings, image_size: int, of_inception: bool = False) -> str:
    """Name of the features to use.

    Args:
        of_inception: whether there is a reference made with Inception.
    """
    if settings.features != "auto":
        return settings.features
    large = image_size > pixel_features.LARGEST
    return "inception" if settings.inception or of_inception or large else pixel_features.NAME


def check_features(reference: Reference, features: Features) -> None:
    """Check that a reference was made with these features.

    Raises:
        UserError: it was made with other features.
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
    """Compute the statistics of all images of a data folder; rank 0 writes them to `out`.

    Args:
        data: folder or address of data, or "digits".
        image_size: side to crop images to; 0: chosen from the data.

    Raises:
        UserError: data or weights are missing, images are too large for pixel features, or `out` cannot be written.
    """
    check_target(out, (".npz",), (data,))
    check_npz(out, "mu.npy")
    kind, path = detect_source(data)
    source = open_source(kind, path, image_size, split)
    size = source.image_size
    if choose_features(settings, size) == pixel_features.NAME:
        pixel_features.check_size(size)
        features: Features = fit_pixels_on_main(source, ranks, device)
    else:
        features = load_inception(settings.inception, settings.inception_sha256, device)
    reference = make_reference(source, features, ranks, settings.batch, workers, track)
    # Data without splits give all their images, whatever split was asked for.
    reference.provenance |= {"data": data, "source": kind, "split": source.split or "no splits: all images"}
    if ranks.main:
        with lock_output(out):
            save_reference(reference, out)
    return reference
