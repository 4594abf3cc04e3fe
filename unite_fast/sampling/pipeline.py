"""A trained model ready to generate, encode and decode images; sampling/molecules.py has that of molecules."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from unite_fast.checkpoint.model_file import load_model
from unite_fast.config import MOLECULES, Config, SamplingConfig, check_seed_and_batch
from unite_fast.errors import UserError, require
from unite_fast.model.unite import UNITE
from unite_fast.sampling import sampler

if TYPE_CHECKING:
    from unite_fast.sampling.molecules import TrainedMolecules

M = TypeVar("M", bound="TrainedModel")


class TrainedModel:
    """A trained model with the settings it was trained with; see `TrainedUNITE` and `molecules.TrainedMolecules`.

    Attributes:
        network: the model with its EMA weights, float32, without gradients.
        config: the settings of its training. Paths and addresses in them are empty, because the file may come from
            anywhere; `unite_fast.checkpoint.format.places_of(config)` has them.
        step: optimizer steps of its training.
        class_names: of its training data, in the order of the labels; empty if they are not known.
    """

    def __init__(self, network: UNITE, config: Config, step: int, class_names: Sequence[str] = ()):
        self.network = network.requires_grad_(False).eval()
        self.config = config
        self.step = step
        self.class_names = list(class_names)

    @classmethod
    def load(cls: type[M], path: str | Path, device: str | torch.device = "cpu") -> M:
        """See `unite_fast.load`.

        Raises:
            UserError: see there; or a model of another modality than this class's.
        """
        model = load_trained(path, device)
        if not isinstance(model, cls):
            raise UserError(f"{path} is a model of {model.config.model.modality}; unite_fast.load loads models of both")
        return model

    def sampling_config(self, **settings) -> SamplingConfig:
        """The recipe's `SamplingConfig` with some of its fields changed.

        Raises:
            UserError: unknown setting, or value out of range.
        """
        return self.config.sampling.changed(**settings)

    def precision_and_compile(self, precision: str | None, compile: bool | None) -> tuple[str, bool]:
        """Fill in defaults: the training precision, bfloat16 for float8; compile on CUDA only."""
        on_cuda = self.network.device.type == "cuda"
        return precision or self.config.train.network_precision, on_cuda if compile is None else compile


class TrainedUNITE(TrainedModel):
    """A model trained on images."""

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
        config = self.sampling_config(**settings)
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
        return self.decode(self.encode(images, seed, batch, first), batch)

    def encode(self, images: Tensor | np.ndarray, seed: int = 0, batch: int = 64, first: int = 0) -> Tensor:
        """Images uint8 [n, 3, S, S] -> latents float32 [n, N, C] on the model's device.

        N tokens, as many as patches, of C channels; each is the output of a LayerNorm. `decode` maps them back. The
        registers of image i are drawn from (seed, first + i).

        Raises:
            UserError: no images, or images of another size or dtype.
        """
        images = torch.as_tensor(images)
        size = self.config.model.image_size
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise UserError(f"images must be uint8 [n, 3, {size}, {size}], got {images.dtype} {list(images.shape)}")
        require(len(images) > 0, "there must be at least one image")
        check_seed_and_batch(seed, batch)
        return sampler.tokenize(self.network, images, seed, batch, first)

    def decode(self, latents: Tensor | np.ndarray, batch: int = 64) -> Tensor:
        """Latents [n, N, C] -> images uint8 [n, 3, S, S] on the CPU.

        Raises:
            UserError: no latents, or latents of another shape.
        """
        latents = torch.as_tensor(latents, dtype=torch.float32, device=self.network.device)
        shape = (self.config.model.latent_tokens, self.config.model.latent_channels)
        if latents.dim() != 3 or latents.shape[1:] != shape:
            raise UserError(f"latents must be [n, {shape[0]}, {shape[1]}], got {list(latents.shape)}")
        require(len(latents) > 0, "there must be at least one image's latents")
        check_seed_and_batch(0, batch)
        return sampler.decode(self.network, latents, batch)


def load_trained(path: str | Path, device: str | torch.device = "cpu") -> "TrainedUNITE | TrainedMolecules":
    """A model of images or molecules; see `unite_fast.load`."""
    from unite_fast.sampling.molecules import TrainedMolecules  # which imports this module

    saved = load_model(path)
    network = UNITE(saved.config.model)
    network.load_state_dict(saved.averages)
    kind = TrainedMolecules if saved.config.model.modality == MOLECULES else TrainedUNITE
    return kind(network.to(device), saved.config, saved.step, saved.class_names)


def weights_sha256(model: TrainedModel) -> str:
    """SHA-256 of the EMA weights (names, shapes, float32 values, sorted by name), whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.network.state_dict().items()):
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()
