"""Quality of a model of small images, where a classical classifier knows the classes."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from unite_fast.config import require
from unite_fast.data_pipeline import Source, open_source, read_readable
from unite_fast.outputs import choose_labels, generate_with_progress, psnr
from unite_fast.trained import TrainedUNITE

LARGEST = 64
"""Side of the images up to which an SVM on pixels is a sensible judge."""
MOST_EXAMPLES = 10_000
"""Real images the classifier learns from; its training time grows faster than their number."""


def evaluate(model: TrainedUNITE, data_path: str, count: int, guidance: float, settings: dict) -> Iterator[str]:
    """Lines of results: reconstruction of the test split, then agreement of the classifier, unguided and guided.

    Raises:
        UserError: images too large, or data that are missing.
    """
    data, size = model.config.data, model.config.model.image_size
    require(
        size <= LARGEST, f"this model makes {size} x {size} images; evaluate is for {LARGEST} x {LARGEST} at the most"
    )
    train, test = (open_source(data.source, data_path or data.path, size, split) for split in ("train", "test"))
    require(model.config.model.num_classes > 1, "this model has one class: there is nothing to classify")
    images, labels = read_some(test, len(test))
    quality = psnr(images, model.reconstruct(images))
    mean_error = (10 ** (-quality / 10)).mean()
    yield (
        f"reconstruction of {len(images)} held-out images: {quality.mean():.2f} dB PSNR (mean over images; "
        f"{-10 * mean_error.log10():.2f} dB of the mean error)"
    )
    classifier = fit_classifier(*read_some(train, MOST_EXAMPLES))
    yield f"classifier (SVM on real pixels): {share(classifier, images, labels):.1%} right on held-out images"
    wanted = choose_labels("", count, model.config.model.num_classes)
    for scale in (1.0, guidance):
        generated = generate_with_progress(model, wanted, 0, 250, {**settings, "guidance": scale})
        kind = "unguided" if scale == 1 else f"guidance {scale:g}"
        yield f"{count} generated images, {kind}: {share(classifier, generated, wanted):.1%} classified as asked for"


def read_some(source: Source, most: int) -> tuple[Tensor, Tensor]:
    """At most so many images and labels, spread evenly over the source, which may be sorted by class; broken ones are
    left out."""
    spread = np.linspace(0, len(source) - 1, min(len(source), most)).round().astype(int)
    return read_readable(source, np.unique(spread), most)


def fit_classifier(images: Tensor, labels: Tensor):
    """A support vector machine with an RBF kernel on grey pixels: images uint8 [n, 3, S, S], labels int64 [n]."""
    from sklearn.svm import SVC

    return SVC(C=10.0).fit(features(images), labels.numpy())


def share(classifier, images: Tensor, labels: Tensor) -> float:
    """Fraction of the images that the classifier gives their label."""
    return float((torch.from_numpy(classifier.predict(features(images))) == labels).double().mean())


def features(images: Tensor):
    return (images.float().mean(1).flatten(1) / 255).numpy()
