"""What turns images into the vectors whose distributions are compared.

n images, S their side in pixels, D dimensions of a feature, K classes of the feature's own classifier.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureBatch:
    pool: Tensor
    """float32 [n, D]: what the Frechet distance, KID, precision and recall look at."""
    logits: Tensor | None = None
    """float32 [n, K]: what the Inception Score looks at; None where there is no classifier."""


class Features(Protocol):
    """
    Attributes:
        name: how results call it; statistics of another name are not comparable.
        title: what the Frechet distance of these features is called, for tables.
        dimension: D.
        classes: K; 0 where there are no logits.
        device: where the features are computed and returned.
        source: where the features come from (path, sha256, ...), for the JSON of a result.
    """

    name: str
    title: str
    dimension: int
    classes: int
    device: torch.device
    source: dict

    def __call__(self, images: Tensor) -> FeatureBatch:
        """uint8 [n, 3, S, S] on `device` -> features there."""
