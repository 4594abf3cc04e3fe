"""Who judges generated images: features, the statistics of real images, and perhaps a classifier."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from unite_fast.config import Config, EvaluationSettings
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError, require
from unite_fast.evaluation import metrics, pixel_features
from unite_fast.evaluation.batches import NumberedBatch, open_named
from unite_fast.evaluation.features import Features
from unite_fast.evaluation.fid import Moments, Reference, frechet_distance, load_reference
from unite_fast.evaluation.inception import DIMENSION, load_inception
from unite_fast.evaluation.pixel_features import Classifier, PixelFeatures, fit_pixels_once, read_some
from unite_fast.evaluation.reference import Kept, Mixed, check_fit, choose_features, make_reference
from unite_fast.utils.progress import Track, no_progress

SAMPLES_PER_DIMENSION = 10
"""With fewer images than this times the dimension of the features, the bias of a Frechet distance is worth a word."""


@dataclass
class Judge:
    features: Features
    reference: Reference
    classifier: Classifier | None = None

    def score(self, batches: Iterable[NumberedBatch], count: int, ranks: Ranks) -> dict:
        """Scores of generated images.

        Args:
            batches: this process's part of samples 0..count - 1, with the labels that were asked for; anything that has
                the `indices`, `images` and `labels` of a `NumberedBatch`.
            count: all processes together.

        Returns:
            The same on every process: `frechet_distance`, and where they could be computed `inception_score`,
            `inception_score_deviation`, `kid`, `kid_deviation`, `kid_subset`, `precision`, `recall`, `compared` (how
            many generated and real images the last five looked at), `class_agreement`.
        """
        device, mixed = self.features.device, Mixed(count)
        moments, kept = Moments(self.features.dimension, device), Kept(mixed)
        inception = metrics.InceptionScore(self.features.classes, device=device) if self.features.classes else None
        right = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            if not len(batch.images):  # processes may come out even by empty ones
                continue
            found = self.features(batch.images.to(device))
            moments.update(found.pool)
            kept.update(batch.indices, found.pool)
            if inception is not None:
                inception.update(found.logits, mixed.splits(batch.indices))
            if self.classifier is not None:
                right += self.classifier.right(batch.images, batch.labels)
        samples = kept.gathered(ranks)
        result = {"frechet_distance": self.distance(moments, ranks)}
        if inception is not None:
            inception.all_reduce(ranks)
            if count >= metrics.SPLITS:
                result["inception_score"], result["inception_score_deviation"] = inception.result()
        if self.classifier is not None:
            result["class_agreement"] = float(ranks.sum(right) / count)
        # Comparing one by one is work for one process; all get the same numbers.
        if ranks.main:
            result |= self._compared_one_by_one(samples)
        return ranks.broadcast(result)

    def distance(self, moments: Moments, ranks: Ranks) -> float:
        """Frechet distance to the real images, the same on every process.

        Args:
            moments: of what this process saw of the generated images; afterwards, of what all saw.
        """
        moments.all_reduce(ranks)
        # The eigenvalues are work for one process.
        distance = frechet_distance(moments.statistics(), self.reference.statistics) if ranks.main else None
        return ranks.broadcast(distance)

    def _compared_one_by_one(self, samples: Tensor) -> dict:
        real = self.reference.samples
        if real is None or min(len(real), len(samples)) <= metrics.NEIGHBOURS:
            return {}
        compared = [len(samples), len(real)]
        size = min(metrics.KID_SUBSET_SIZE, len(real), len(samples))
        real, samples = real.to(self.features.device), samples.to(self.features.device)
        distance, deviation = metrics.kid(samples, real, size=size)
        precision, recall = metrics.precision_recall(samples, real)
        return {
            "kid": distance,
            "kid_deviation": deviation,
            "kid_subset": size,
            "precision": precision,
            "recall": recall,
            "compared": compared,
        }

    def notes(self, count: int) -> list[str]:
        """What a reader must know of the scores of `count` images: their bias, and which there are not."""
        lines = self.bias_notes(count)
        if self.features.classes and count < metrics.SPLITS:
            lines.append(f"no Inception Score: it takes {metrics.SPLITS} splits, and {count} images are too few")
        if self.reference.samples is None:
            lines.append(
                "no KID, precision and recall: the reference holds no features of single images; "
                "unite-fast stats makes one that does"
            )
        return lines

    def bias_notes(self, *counts: int) -> list[str]:
        """What a reader must know before comparing a distance of so many generated images with another."""
        kinds = [(count, "generated") for count in dict.fromkeys(counts)]
        if self.reference.count:
            kinds.append((self.reference.count, "real"))
        warnings = (bias_warning(count, self.features.dimension, kind) for count, kind in kinds)
        return [warning for warning in warnings if warning]


def bias_warning(count: int, dimension: int, kind: str) -> str:
    """Why the Frechet distance of so few images is too large; empty if they are enough."""
    if count <= dimension:
        return (
            f"{count} {kind} images are too few for {dimension} features: their covariance has rank {count - 1} at "
            "most, which makes the Frechet distance too large by an amount that depends on their number; compare it "
            "only with distances of as many"
        )
    if count < SAMPLES_PER_DIMENSION * dimension:
        return (
            f"{count} {kind} images for {dimension} features: the error of their covariance makes the Frechet distance "
            "too large (the excess falls in proportion to 1 / images); compare it only with distances of as many"
        )
    return ""


def open_judge(
    config: Config,
    settings: EvaluationSettings,
    ranks: Ranks,
    device: torch.device | str,
    track: Track = no_progress,
    classifier: bool = True,
) -> Judge:
    """Features, reference and classifier for the images of a model with this configuration.

    Features "auto" are Inception's if its weights or a reference made with it are named or the images are too large for
    pixels, else pixels. Without a reference, pixels are held against the model's training images.

    Args:
        classifier: teach one too, where classes can be told from pixels; that takes seconds.

    Raises:
        UserError: files that are missing or do not fit each other.
    """
    known = load_reference(settings.reference) if settings.reference else None
    of_inception = known is not None and len(known.statistics.mean) == DIMENSION
    if choose_features(settings, config.model.image_size, of_inception) == pixel_features.NAME:
        classifier = classifier and config.model.num_classes > 1
        return _pixel_judge(config, settings, known, ranks, device, track, classifier)
    require(
        known is not None,
        "the FID needs statistics of real images: name them with --reference REF.npz; "
        "unite-fast stats DATA REF.npz --features inception makes them",
    )
    features = load_inception(settings.inception, settings.inception_sha256, device)
    check_fit(known, features)
    return Judge(features, known)


def _pixel_judge(
    config: Config,
    settings: EvaluationSettings,
    known: Reference | None,
    ranks: Ranks,
    device: torch.device | str,
    track: Track,
    classifier: bool,
) -> Judge:
    size = config.model.image_size
    require(
        size <= pixel_features.LARGEST,
        f"the model's images are {size} x {size}; features pixels are for sides up to {pixel_features.LARGEST}: "
        "use --features inception",
    )
    if known is not None:
        require(
            bool(known.basis),
            f"{known.path} holds no components of pixels: make it with unite-fast stats DATA OUT.npz --features pixels",
        )
        features = PixelFeatures(known.basis, known.about.get("features_source"), device)
        require(
            features.image_size == size,
            f"{known.path} is of images of side {features.image_size}, this model makes {size} x {size}",
        )
        check_fit(known, features)
        if not classifier:
            return Judge(features, known)
    try:
        source = open_named(config, settings.data, "train")
    except UserError as error:
        raise UserError(f"{error}; name the training images with --data FOLDER") from error
    classes = config.model.num_classes
    require(
        not classifier or len(source.class_names) == classes,
        f"the data have {len(source.class_names)} classes and the model has {classes}, so they cannot teach the "
        "classifier: name the data that it was trained on with --data FOLDER",
    )
    if known is None:
        features = fit_pixels_once(source, ranks, device)
        known = make_reference(source, features, ranks, settings.batch, config.data.workers, track)
    return Judge(
        features, known, Classifier(*read_some(source, pixel_features.CLASSIFIER_IMAGES)) if classifier else None
    )
