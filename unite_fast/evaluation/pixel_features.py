"""Judges of small images that need no downloaded weights: principal components of the pixels, and a classifier.

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
"""Side of the images up to which pixels are a sensible judge."""
FITTED_IMAGES = 2048
"""Images that the components are fitted to: the work grows with the square of their number."""
SHARE_OF_VARIANCE, MOST_COMPONENTS = 0.99, 64
CLASSIFIER_IMAGES = 10_000
"""Real images the classifier learns from; its training time grows faster than their number."""


class PixelFeatures:
    """The first principal components of the pixels of real images.

    A Frechet distance of these is not the FID and says so: it sees blur, noise, wrong colours and missing classes, and
    nothing that pixels do not show. It can be compared only between results with the same components.
    """

    name = NAME
    title = "Frechet distance of PCA-reduced pixels"
    classes = 0

    def __init__(self, basis: Mapping[str, Tensor], source: dict | None = None, device: torch.device | str = "cpu"):
        """
        Args:
            basis: `mean` float32 [P] and `components` float32 [k, P], for pixels in [0, 1].
        """
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
            UserError: images of another size than the components are for.
        """
        require(
            images[0].numel() == len(self.mean),
            f"these pixel features are for images of side {self.image_size}, not {images.shape[-1]}",
        )
        return FeatureBatch((images.to(self.mean).flatten(1) / 255 - self.mean) @ self.components.T)


def fit_pixels(images: Tensor) -> PixelFeatures:
    """The components that hold 99 % of the variance of images uint8 [n, 3, S, S], at most 64, largest first.

    Raises:
        UserError: images that are all the same.
    """
    require(bool((images != images[0]).any()), "the pixel features have nothing to look at: all images are the same")
    pixels = images.double().flatten(1) / 255
    mean = pixels.mean(dim=0)
    centred = pixels - mean
    n, p = centred.shape
    # Of X^T X [P, P] and X X^T [n, n] the smaller: they share their non-zero eigenvalues.
    few = n < p
    values, vectors = torch.linalg.eigh(centred @ centred.T if few else centred.T @ centred)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    k = int((values.cumsum(0) < SHARE_OF_VARIANCE * values.sum()).sum()) + 1
    vectors = vectors[:, : min(k, MOST_COMPONENTS)]
    components = torch.nn.functional.normalize(centred.T @ vectors, dim=0) if few else vectors
    source = {"fitted_to": n, "share_of_variance": float(values[: len(components.T)].sum() / values.sum())}
    return PixelFeatures({"mean": mean.float(), "components": components.T.contiguous().float()}, source)


def read_some(source: Source, most: int) -> tuple[Tensor, Tensor]:
    """At most so many images and labels, spread evenly over the source, which may be sorted by class; broken ones are
    left out."""
    spread = np.linspace(0, len(source) - 1, min(len(source), most)).round().astype(int)
    return read_readable(source, np.unique(spread), most)


class Classifier:
    """An independent judge of class: a support vector machine with an RBF kernel on the grey pixels of real images.

    Args:
        images: uint8 [n, 3, S, S].
        labels: int64 [n], of at least two classes.
    """

    def __init__(self, images: Tensor, labels: Tensor):
        from sklearn.svm import SVC

        self._machine = SVC(C=10.0).fit(_grey(images), labels.numpy())

    def right(self, images: Tensor, labels: Tensor) -> int:
        """How many of the images get their label."""
        return int((torch.from_numpy(self._machine.predict(_grey(images))) == labels).sum())


def _grey(images: Tensor) -> np.ndarray:
    return (images.float().mean(1).flatten(1) / 255).numpy()


def fit_pixels_once(source: Source, ranks: Ranks, device: torch.device | str) -> PixelFeatures:
    """Fitted by one process, so that all have the same components to the last bit."""
    fitted = fit_pixels(read_some(source, FITTED_IMAGES)[0]) if ranks.main else None
    basis, about = ranks.broadcast((fitted.basis, fitted.source) if fitted else None)
    return PixelFeatures(basis, about, device)
