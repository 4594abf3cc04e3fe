"""Evaluator of generated images: features, statistics of real images and an optional classifier."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unite_fast.config import Config
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError, require
from unite_fast.evaluation import metrics, pixel_features
from unite_fast.evaluation.batches import check_classes, kind_of_training, open_images
from unite_fast.evaluation.features import Features
from unite_fast.evaluation.fid import Moments, Reference, frechet_distance, load_reference
from unite_fast.evaluation.inception import DIMENSION, load_inception
from unite_fast.evaluation.pixel_features import Classifier, PixelFeatures, fit_pixels_on_main, read_evenly
from unite_fast.evaluation.reference import KeptFeatures, SampleOrder, check_features, choose_features, make_reference
from unite_fast.evaluation.settings import EvaluationSettings
from unite_fast.utils.progress import Track, no_progress

SAMPLES_PER_DIMENSION = 10
"""Minimum images per feature dimension; with fewer, results warn that the Frechet distance is biased."""


class LabelledImages(Protocol):
    """Images with their indices in a series and their labels: `NumberedBatch` and `Samples`."""

    @property
    def indices(self) -> Tensor: ...
    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...


@dataclass
class Evaluator:
    features: Features
    reference: Reference
    classifier: Classifier | None = None
    class_names: Sequence[str] = ()
    """Names of the classifier's classes."""

    def score(self, batches: Iterable[LabelledImages], count: int, ranks: Ranks) -> dict:
        """Score generated images.

        Args:
            batches: this rank's part of samples 0..count - 1, with the labels they were generated for.
            count: samples on all ranks together.

        Returns:
            The same on every rank: `frechet_distance`, and where they could be computed `inception_score`,
            `inception_score_deviation`, `kid`, `kid_deviation`, `kid_subset`, `precision`, `recall`, `compared`
            (numbers of generated and real images used for KID, precision and recall), `class_agreement`.
        """
        device, order = self.features.device, SampleOrder(count)
        moments, kept = Moments(self.features.dimension, device), KeptFeatures(order)
        inception = metrics.InceptionScore(self.features.classes, device=device) if self.features.classes else None
        correct = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            if not len(batch.images):  # the last round of a rank may be empty
                continue
            features = self.features(batch.images.to(device))
            moments.update(features.pool)
            kept.update(batch.indices, features.pool)
            if inception is not None:
                assert features.logits is not None  # features with classes have logits
                inception.update(features.logits, order.splits(batch.indices))
            if self.classifier is not None:
                correct += self.classifier.count_correct(batch.images, batch.labels)
        samples = kept.gather(ranks)
        result: dict = {"frechet_distance": self.distance(moments, ranks)}
        if inception is not None:
            inception.all_reduce(ranks)
            if count >= metrics.SPLITS:
                result["inception_score"], result["inception_score_deviation"] = inception.result()
        if self.classifier is not None:
            result["class_agreement"] = float(ranks.sum(correct) / count)
        if ranks.main:  # the pairwise metrics run on one rank
            result |= self._pairwise_metrics(samples)
        return ranks.broadcast(result)

    def distance(self, moments: Moments, ranks: Ranks) -> float:
        """Frechet distance to the real images, the same on every rank.

        Args:
            moments: of this rank's generated images; summed over the ranks on return.
        """
        moments.all_reduce(ranks)
        # One rank computes the eigenvalues.
        distance = frechet_distance(moments.statistics(), self.reference.statistics) if ranks.main else None
        return ranks.broadcast(distance)

    def _pairwise_metrics(self, samples: Tensor | None) -> dict:
        """KID, precision and recall from single features [m, D]; empty if there are too few."""
        real = self.reference.samples
        if real is None or samples is None or min(len(real), len(samples)) <= metrics.NEIGHBOURS:
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
        """Caveats for scores of `count` images: bias, and metrics that are missing."""
        lines = self.bias_notes(count)
        if self.features.classes and count < metrics.SPLITS:
            lines.append(f"no Inception Score: {count} images are too few for {metrics.SPLITS} splits")
        if self.reference.samples is None:
            lines.append(
                "no KID, precision and recall: the reference has no features of single images; "
                "unite-fast stats writes a reference that has them"
            )
        return lines

    def bias_notes(self, *counts: int) -> list[str]:
        """Warnings that a Frechet distance is biased: for each number of generated images, and for the reference."""
        kinds = [(count, "generated") for count in dict.fromkeys(counts)]
        if self.reference.count:
            kinds.append((self.reference.count, "real"))
        warnings = (bias_warning(count, self.features.dimension, kind) for count, kind in kinds)
        return [warning for warning in warnings if warning]


def bias_warning(count: int, dimension: int, kind: str) -> str:
    """Why the Frechet distance of so few images is too large; empty if there are enough."""
    if count <= dimension:
        return (
            f"{count} {kind} images are too few for {dimension} features: their covariance has rank {count - 1} at "
            "most, which makes the Frechet distance too large by an amount that depends on the count; compare it "
            "only with distances of the same count"
        )
    if count < SAMPLES_PER_DIMENSION * dimension:
        return (
            f"{count} {kind} images for {dimension} features: the error of their covariance makes the Frechet distance "
            "too large (the excess falls as 1 / count); compare it only with distances of the same count"
        )
    return ""


def open_evaluator(
    config: Config,
    settings: EvaluationSettings,
    ranks: Ranks,
    device: torch.device | str,
    track: Track = no_progress,
    classifier: bool = True,
    class_names: Sequence[str] = (),
) -> Evaluator:
    """Features, reference and classifier for the images of a model with this config.

    With features "auto", Inception is used if its weights or an Inception reference are given, or if the images are too
    large for pixel features; otherwise pixels. Without a reference, pixel features compare with the training images.

    Args:
        classifier: also fit a classifier if the features are pixels; takes seconds.
        class_names: of the model, to compare with those that the classifier learns; see `check_classes`.

    Raises:
        UserError: files are missing or do not match.
    """
    reference = load_reference(settings.reference) if settings.reference else None
    of_inception = reference is not None and len(reference.statistics.mean) == DIMENSION
    if choose_features(settings, config.model.image_size, of_inception) == pixel_features.NAME:
        classifier = classifier and config.model.num_classes > 1
        return _pixel_evaluator(config, settings, reference, ranks, device, track, classifier, class_names)
    if reference is None:
        raise UserError(
            "FID needs statistics of real images: set --reference REF.npz (in a recipe evaluation.reference); "
            "unite-fast stats DATA REF.npz --features inception writes them"
        )
    features = load_inception(settings.inception, settings.inception_sha256, device)
    check_features(reference, features)
    return Evaluator(features, reference)


def _pixel_evaluator(
    config: Config,
    settings: EvaluationSettings,
    reference: Reference | None,
    ranks: Ranks,
    device: torch.device | str,
    track: Track,
    classifier: bool,
    class_names: Sequence[str],
) -> Evaluator:
    size = config.model.image_size
    pixel_features.check_size(size)
    features = None
    if reference is not None:
        require(
            bool(reference.basis),
            f"{reference.path} has no pixel components: make it with unite-fast stats DATA OUT.npz --features pixels",
        )
        features = PixelFeatures(reference.basis, reference.provenance.get("features_source"), device)
        require(
            features.image_size == size,
            f"{reference.path} is for images of side {features.image_size}, this model makes {size} x {size}",
        )
        check_features(reference, features)
        if not classifier:
            return Evaluator(features, reference)
    try:
        source = open_images(config, settings.data, "train")
    except UserError as error:
        raise UserError(f"{error}; name the training images with --data FOLDER") from error
    classes = config.model.num_classes
    require(
        not classifier or len(source.class_names) == classes,
        f"the data have {len(source.class_names)} classes and the model has {classes}, so the classifier cannot be "
        "fitted: name the data that the model was trained on with --data FOLDER",
    )
    if classifier:
        check_classes(source, class_names)
    if reference is None or features is None:
        features = fit_pixels_on_main(source, ranks, device)
        reference = make_reference(source, features, ranks, settings.batch, config.data.workers, track)
        reference.provenance["kind"] = kind_of_training(config, settings.data, source)
    if not classifier:
        return Evaluator(features, reference)
    fitted = Classifier(*read_evenly(source, pixel_features.CLASSIFIER_IMAGES))
    return Evaluator(features, reference, fitted, source.class_names)
