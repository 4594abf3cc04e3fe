"""Feature extractors: images -> vectors whose distributions are compared.

n images, S their side in pixels, D feature dimension, K classes of the extractor's own classifier.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureBatch:
    pool: Tensor
    """float32 [n, D], for Frechet distance, KID, precision and recall."""
    logits: Tensor | None = None
    """float32 [n, K], for the Inception Score; None if there is no classifier."""


class Features(Protocol):
    """A feature extractor.

    Attributes:
        name: name in results; statistics of different names cannot be compared.
        title: name of the Frechet distance of these features, for tables.
        dimension: D.
        classes: K; 0 if there are no logits.
        device: where features are computed and returned.
        source: origin of the features (path, sha256, ...), for the JSON of a result.
    """

    name: str
    title: str
    dimension: int
    classes: int
    source: dict

    @property
    def device(self) -> torch.device: ...

    def __call__(self, images: Tensor) -> FeatureBatch:
        """uint8 [n, 3, S, S] on `device` -> features on `device`."""
        ...
