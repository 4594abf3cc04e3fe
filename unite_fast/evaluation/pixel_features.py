"""Evaluation of small images without downloaded weights: principal components of the pixels, and a classifier.

n images, S their side, P = 3 S S pixel values, k components.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from unite_fast.data_pipeline import Source, read_readable
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import require
from unite_fast.evaluation.features import FeatureBatch

NAME = "pixels"
LARGEST = 64
"""Largest side of images for which pixel features are meaningful."""
FITTED_IMAGES = 2048
"""Images that the components are fitted to; the cost is quadratic in their number."""
SHARE_OF_VARIANCE, MAX_COMPONENTS = 0.99, 64
CLASSIFIER_IMAGES = 10_000
"""Real images that the classifier is fitted to; the cost grows faster than their number."""


class PixelFeatures:
    """The first principal components of the pixels of real images.

    Their Frechet distance is not the FID, and has another title. It detects blur, noise, wrong colours and missing
    classes. Distances can be compared only if they use the same components.
    """

    name = NAME
    title = "Frechet distance of PCA-reduced pixels"
    classes = 0

    def __init__(self, basis: Mapping[str, Tensor], source: dict | None = None, device: torch.device | str = "cpu"):
        """`basis`: `mean` float32 [P] and `components` float32 [k, P], for pixels in [0, 1]."""
        self.mean, self.components = (basis[name].to(device) for name in ("mean", "components"))
        self.dimension = len(self.components)
        self.device = self.mean.device
        self.source = source or {}

    @property
    def basis(self) -> dict[str, Tensor]:
        return {"mean": self.mean.cpu(), "components": self.components.cpu()}

    @property
    def image_size(self) -> int:
        return round((len(self.mean) / 3) ** 0.5)

    def __call__(self, images: Tensor) -> FeatureBatch:
        """uint8 [n, 3, S, S] -> pool float32 [n, k].

        Raises:
            UserError: images of another size than the components.
        """
        require(
            images[0].numel() == len(self.mean),
            f"these pixel features are for images of side {self.image_size}, not {images.shape[-1]}",
        )
        return FeatureBatch((images.to(self.mean).flatten(1) / 255 - self.mean) @ self.components.T)


def fit_pixels(images: Tensor) -> PixelFeatures:
    """Fit the components with 99 % of the variance of images uint8 [n, 3, S, S], at most 64, largest first.

    Raises:
        UserError: all images are equal.
    """
    require(bool((images != images[0]).any()), "pixel features cannot be fitted: all images are the same")
    pixels = images.double().flatten(1) / 255
    mean = pixels.mean(dim=0)
    centred = pixels - mean
    n, p = centred.shape
    # The smaller of X^T X [P, P] and X X^T [n, n]: both have the same non-zero eigenvalues.
    few = n < p
    values, vectors = torch.linalg.eigh(centred @ centred.T if few else centred.T @ centred)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    k = int((values.cumsum(0) < SHARE_OF_VARIANCE * values.sum()).sum()) + 1
    vectors = vectors[:, : min(k, MAX_COMPONENTS)]
    components = torch.nn.functional.normalize(centred.T @ vectors, dim=0) if few else vectors
    source = {"fitted_to": n, "share_of_variance": float(values[: len(components.T)].sum() / values.sum())}
    return PixelFeatures({"mean": mean.float(), "components": components.T.contiguous().float()}, source)


def read_evenly(source: Source, limit: int) -> tuple[Tensor, Tensor]:
    """At most `limit` images and labels, evenly spaced over the source, which may be sorted by class; unreadable ones
    are left out."""
    indices = np.linspace(0, len(source) - 1, min(len(source), limit)).round().astype(int)
    return read_readable(source, np.unique(indices), limit)


class Classifier:
    """Checks classes independently of the model: an SVM with an RBF kernel, fitted to grey pixels of real images.

    Args:
        images: uint8 [n, 3, S, S].
        labels: int64 [n], of at least two classes.
    """

    def __init__(self, images: Tensor, labels: Tensor):
        from sklearn.svm import SVC

        self._machine = SVC(C=10.0).fit(_grey(images), labels.numpy())

    def count_correct(self, images: Tensor, labels: Tensor) -> int:
        """Number of images that are classified as their label."""
        return int((torch.from_numpy(self._machine.predict(_grey(images))) == labels).sum())


def _grey(images: Tensor) -> np.ndarray:
    return (images.float().mean(1).flatten(1) / 255).numpy()


def check_size(size: int) -> None:
    """
    Raises:
        UserError: images of this side are too large for pixel features.
    """
    require(
        size <= LARGEST,
        f"the images are {size} x {size}; --features pixels works up to {LARGEST} x {LARGEST}: "
        "use --features inception",
    )


def fit_pixels_on_main(source: Source, ranks: Ranks, device: torch.device | str) -> PixelFeatures:
    """Fit pixel features on rank 0 and broadcast them, so that all ranks have the same bits."""
    fitted = fit_pixels(read_evenly(source, FITTED_IMAGES)[0]) if ranks.main else None
    basis, origin = ranks.broadcast((fitted.basis, fitted.source) if fitted else None)
    return PixelFeatures(basis, origin, device)
