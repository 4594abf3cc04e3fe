"""A fast trainer for UNITE: one network that is tokenizer and latent denoiser, trained in one stage.

model = unite_fast.load("runs/digits")
images = model.generate([3, 1, 4], guidance=2.0)
copies = model.reconstruct(images)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unite_fast.sampling.pipeline import TrainedUNITE

__version__ = "0.1.0"


def load(path, device: str = "cpu") -> "TrainedUNITE":
    """A trained model with its averaged (EMA) weights.

    Args:
        path: a run's folder, which means its newest undamaged checkpoint; a checkpoint; or a file that `unite-fast
            export` wrote.
        device: where to put it.

    Raises:
        UserError: no such checkpoint, or one that cannot be read.
    """
    from unite_fast.sampling.pipeline import (
        TrainedUNITE,  # torch takes seconds to import: only who loads a model waits for it
    )

    return TrainedUNITE.load(path, device)
