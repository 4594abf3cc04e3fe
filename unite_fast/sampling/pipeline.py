"""A trained model ready to generate and reconstruct images."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unite_fast.checkpoint.model_file import load_model
from unite_fast.config import Config, check_seed_and_batch
from unite_fast.errors import UserError, require
from unite_fast.model.unite import UNITE
from unite_fast.sampling import sampler


class TrainedUNITE:
    """A trained model with the settings it was trained with.

    Attributes:
        network: the model with its EMA weights, float32, without gradients.
        config: the settings of its training.
        step: optimizer steps of its training.
    """

    def __init__(self, network: UNITE, config: Config, step: int):
        self.network = network.requires_grad_(False).eval()
        self.config = config
        self.step = step

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "TrainedUNITE":
        """See `unite_fast.load`."""
        saved = load_model(path)
        network = UNITE(saved.config.model)
        network.load_state_dict(saved.averages)
        for name, parameter in network.named_parameters():
            require(bool(parameter.isfinite().all()), f"the weights in {path} are not finite: {name}")
        return cls(network.to(device), saved.config, saved.step)

    def generate(
        self, labels: Sequence[int] | Tensor, seed: int = 0, batch: int = 64, first: int = 0, **settings
    ) -> Tensor:
        """Generate one image per label.

        Args:
            labels: classes, [n].
            seed: the noise of image i is drawn from (seed, first + i).
            batch: images per forward pass.
            first: offset of the first image, to generate a long series in parts.
            settings: fields of `SamplingConfig`, for example `guidance=2.0, solver="euler", steps=20`; the recipe sets
                the others.

        Returns:
            uint8 [n, 3, S, S].

        Raises:
            UserError: class or setting out of range.
        """
        config = self.config.sampling.changed(**settings)
        labels = torch.as_tensor(labels, dtype=torch.int64)
        require(labels.dim() == 1 and len(labels) > 0, f"labels must be a list of classes, got {labels.tolist()}")
        check_seed_and_batch(seed, batch)
        return sampler.sample_images(self.network, labels, config, seed, batch, first)

    def reconstruct(self, images: Tensor | np.ndarray, seed: int = 0, batch: int = 64, first: int = 0) -> Tensor:
        """Encode and decode images: uint8 [n, 3, S, S] -> uint8 [n, 3, S, S].

        The registers of image i are drawn from (seed, first + i).

        Raises:
            UserError: no images, or images of another size or dtype.
        """
        images = torch.as_tensor(images)
        size = self.config.model.image_size
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise UserError(
                f"reconstruct takes uint8 images [n, 3, {size}, {size}], got {images.dtype} {list(images.shape)}"
            )
        require(len(images) > 0, "reconstruct needs at least one image")
        check_seed_and_batch(seed, batch)
        return sampler.reconstruct(self.network, images, seed, batch, first)


def weights_sha256(model: TrainedUNITE) -> str:
    """SHA-256 of the EMA weights (names, shapes, float32 values, sorted by name), whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.network.state_dict().items()):
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()
