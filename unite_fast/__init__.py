"""A fast trainer for UNITE: one network that is tokenizer and latent denoiser, trained in one stage.

model = unite_fast.load("runs/digits")
images = model.generate([3, 1, 4], guidance=2.0)
copies = model.reconstruct(images)
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from unite_fast.sampling.molecules import TrainedMolecules
    from unite_fast.sampling.pipeline import TrainedUNITE

__version__ = version("unite-fast")


def load(path: "str | Path", device: "str | torch.device" = "cpu") -> "TrainedUNITE | TrainedMolecules":
    """Load a trained model of images or molecules with its averaged (EMA) weights.

    Args:
        path: a run folder, which means its newest undamaged checkpoint; a checkpoint; or a file written by
            `unite-fast export`.
        device: cpu, cuda or cuda:N.

    Raises:
        UserError: no such checkpoint, or one that cannot be read.
    """
    # Imported here because it imports torch, which takes seconds.
    from unite_fast.sampling.pipeline import load_trained

    return load_trained(path, device)
