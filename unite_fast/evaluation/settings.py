"""Arguments of `unite-fast evaluate`, `stats` and `search-guidance`; they are not settings of a recipe.

Of the package, this module imports only `config` and `errors`, so that `--help` does not load torch.
"""

import math
from dataclasses import dataclass, field

from unite_fast.config import FEATURES, INCEPTION_SHA256, PRECISIONS, check_count, check_seed_and_batch, is_digest
from unite_fast.errors import require, require_choice

EVALUATION_SAMPLES = {"inception": 50_000, "pixels": 1_000}
"""Generated images for `unite-fast evaluate`, by features."""
SEARCH_SAMPLES = {"inception": (5_000, 50_000), "pixels": (500, 2_000)}
"""Generated images per candidate in `unite-fast search-guidance`, by features: (search, confirmation)."""


@dataclass
class EvaluationSettings:
    """What to evaluate, against what, and how."""

    features: str = "auto"
    """inception (FID), pixels (small images, no weights needed) or auto."""
    inception: str = ""
    """File of Inception's weights; empty: the environment variable UNITE_FAST_INCEPTION."""
    inception_sha256: str = INCEPTION_SHA256
    """SHA-256 of Inception's weights in hex, or its first digits (8 at least)."""
    reference: str = ""
    """An .npz with statistics of real images; empty, with pixels: the training images."""
    data: str = ""
    """Folder or address of the data, of any kind; empty: the training data."""
    count: int | None = None
    """Generated images for each guidance scale; None: `EVALUATION_SAMPLES`."""
    guidance: tuple[float, ...] = ()
    """Guidance scales to evaluate; empty: unguided, and the recipe's."""
    sampling: dict = field(default_factory=dict)
    """Sampling settings that differ from the recipe's: solver, steps, interval, order, time_shift."""
    seed: int = 0
    """Seed of the noise."""
    batch: int = 128
    """Images per forward pass of a process; another batch size may change the last bits of a result."""
    precision: str = ""
    """Precision of generation: float32 or bfloat16; empty: that of training. Reconstructions are float32."""
    compile: bool | None = None
    """Compile the network for generation; None: on CUDA."""
    reconstructions: int = 50_000
    """Held-out images to reconstruct, at most; 0: none."""

    def __post_init__(self):
        require_choice("--features", self.features, FEATURES)
        require(is_digest(self.inception_sha256), "--inception-sha256 must be 8 to 64 hex digits")
        if self.count is not None:
            check_count("--count", self.count, least=2)
        require(all(math.isfinite(scale) for scale in self.guidance), "--guidance must be finite")
        require("guidance" not in self.sampling, "sampling must not hold guidance; set the field guidance instead")
        check_seed_and_batch(self.seed, self.batch, "--")
        if self.precision:
            require_choice("--precision", self.precision, PRECISIONS)
        if self.reconstructions:
            check_count("--reconstructions", self.reconstructions, least=2)
