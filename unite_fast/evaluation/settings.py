"""What an evaluation is asked to do."""

import math
from dataclasses import dataclass, field

from unite_fast.config import require, require_choice
from unite_fast.errors import UserError
from unite_fast.evaluation.inception import INCEPTION_FILE
from unite_fast.trained import check_drawing
from unite_fast.weight_file import is_digest

FEATURES = ("auto", "inception", "pixels")


@dataclass
class EvaluationSettings:
    features: str = "auto"
    """inception (FID), pixels (small images, no weights needed) or auto."""
    inception: str = ""
    """File of Inception's weights; empty: the environment variable UNITE_FAST_INCEPTION."""
    inception_sha256: str = INCEPTION_FILE.sha256
    """What that file's SHA-256 starts with."""
    reference: str = ""
    """A .npz with the statistics of real images; empty, with pixels: the training images."""
    data: str = ""
    """Folder or address of the data, of whatever kind; empty: those trained on."""
    count: int | None = None
    """Generated images for each guidance scale; None: 50,000 with Inception, 1,000 with pixels."""
    guidance: tuple[float, ...] = ()
    """Guidance scales to evaluate; empty: unguided, and the recipe's."""
    sampling: dict = field(default_factory=dict)
    """Settings of sampling that differ from the recipe's: solver, steps, interval, order, time_shift."""
    seed: int = 0
    batch: int = 128
    """Images at a time; it is part of the definition of a result's last bits."""
    precision: str = ""
    """Of generating: float32 or bfloat16; empty: what the model was trained in. Reconstructions are float32."""
    compile: bool | None = None
    """Compile the network for generating; None: on CUDA."""
    reconstructions: int = 50_000
    """Held-out images to reconstruct, at most; 0: none."""

    def __post_init__(self):
        require_choice("features", self.features, FEATURES)
        require(is_digest(self.inception_sha256), f"{INCEPTION_FILE.sha256_key} must be 8 to 64 hex digits")
        enough = "a covariance needs at least 2"
        require(self.count is None or self.count >= 2, f"the count is {self.count} images; {enough}")
        check_drawing(self.seed, self.batch)
        require_choice("the precision", self.precision, ("", "float32", "bfloat16"))
        require(
            self.reconstructions == 0 or self.reconstructions >= 2,
            f"the number of reconstructions is {self.reconstructions}; {enough}, or give 0 for none",
        )
        require(all(math.isfinite(scale) for scale in self.guidance), "guidance must be finite")
        if "guidance" in self.sampling:
            raise UserError("guidance scales are given by guidance, not among the other settings of sampling")
