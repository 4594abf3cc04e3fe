"""UNITE: the Generative Encoder, a LayerNorm on its latents, and the decoder.

The forward passes never call a random generator: every draw is an argument.
"""

from typing import Any

import torch
from torch import Tensor, nn

from unite_fast import flow, kernels
from unite_fast.config import IMAGES, MOLECULES, ModelConfig
from unite_fast.distributed.dtensor import local
from unite_fast.kernels.tensors import upcast
from unite_fast.model.decoder import Decoder
from unite_fast.model.generative_encoder import GenerativeEncoder
from unite_fast.model.layers import fill
from unite_fast.model.molecules import MoleculeDecoder, MoleculeEncoder

PARTS = {IMAGES: (GenerativeEncoder, Decoder), MOLECULES: (MoleculeEncoder, MoleculeDecoder)}
"""Encoder and decoder by modality."""


class LatentNorm(nn.LayerNorm):
    """The LayerNorm of the latents. If `plain`, weight and bias are the constants 1 and 0."""

    def __init__(self, channels: int, plain: bool):
        super().__init__(channels)
        if plain:
            for name, value in (("weight", torch.ones(channels)), ("bias", torch.zeros(channels))):
                delattr(self, name)
                self.register_buffer(name, value, persistent=False)

    def initialize(self) -> None:
        fill(self.weight, nn.init.ones_)
        fill(self.bias, nn.init.zeros_)


class UNITE(nn.Module):
    """B batch, N latent tokens, C latent channels, S image size.

    Molecules have N atoms. `lengths` is the number of atoms of each, int64 [B], where N is larger: the rest are pads,
    whose results mean nothing. None means no pads. Images have none.
    """

    size_counts: Tensor
    """Molecules only: the number of training molecules of each size, float32 [num_classes]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        encoder, decoder = PARTS[config.modality]
        self.encoder = encoder(config)
        self.latent_norm = LatentNorm(config.latent_channels, plain=config.latent_norm == "layer_plain")
        self.decoder = decoder(config)
        if config.modality == MOLECULES:
            # How many training molecules have each number of atoms: generated ones have sizes from it.
            self.register_buffer("size_counts", torch.empty(config.num_classes))

    @classmethod
    def create(cls, config: ModelConfig, seed: int) -> "UNITE":
        """An initialised model."""
        model = cls(config)
        model.initialize(seed)
        return model

    def initialize(self, seed: int) -> None:
        """Initialise all parameters and buffers, the same on every machine and for every world size. A model built on
        the meta device needs this after `to_empty`, which leaves arbitrary memory.

        `reset_parameters` of torch's modules is not called: `initialize` of encoder or decoder must set every tensor.

        Raises:
            RuntimeError: a parameter or buffer was not set, for example that of a new kind of norm.
        """
        tensors = dict((*self.named_parameters(), *self.named_buffers()))
        generator = torch.Generator().manual_seed(seed % 2**63)
        with torch.no_grad():
            # Every in-place write raises a tensor's version. Unlike a search for NaN, reading it needs no device sync.
            versions = {name: local(tensor)._version for name, tensor in tensors.items()}
            self.encoder.initialize(generator)
            self.latent_norm.initialize()
            self.decoder.initialize(generator)
            if self.config.modality == MOLECULES:
                fill(self.size_counts, nn.init.zeros_)
            for name, tensor in tensors.items():
                if local(tensor)._version == versions[name]:
                    raise RuntimeError(f"UNITE.initialize does not set {name}; set it in its module's initialize()")

    def tokenize(self, data: Tensor, registers: Tensor, t: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode images or molecules.

        Args:
            data: images [B, 3, S, S] in [0, 1], or atoms float32 [B, N, 4]: the number of the element and the position
                in Angstrom.
            registers: N(0, 1), [B, N, C].
            t: U(0, 0.01), [B].

        Returns:
            Latents [B, N, C].
        """
        no_class = torch.full((len(data),), self.config.num_classes, device=data.device)
        return self._normalise(self.encoder(registers, t, no_class, data, lengths))

    def denoise(self, x_t: Tensor, t: Tensor, labels: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Predict clean latents: x_t [B, N, C], t [B], labels int64 [B] (num_classes means none) -> [B, N, C]."""
        return self._normalise(self.encoder(x_t, t, labels, lengths=lengths))

    def denoising_loss(
        self, x_t: Tensor, t: Tensor, labels: Tensor, z: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """The flow loss of `denoise` in one kernel, without the predicted latents in memory.

        Per sample: mean over its tokens and C of ((x_hat - z) / max(1 - t, MIN_TIME_LEFT))^2, the error of the
        velocity.

        Args:
            x_t: F noisy versions of every sample's latents, [F, B, N, C].
            t: their times, [F, B].
            labels: int64 [F, B].
            z: the clean latents, [B, N, C], without a gradient.

        Returns:
            float32 [F, B].
        """
        all_lengths = None if lengths is None else lengths.repeat(len(t))
        latents = self.encoder(x_t.flatten(0, 1), t.flatten(), labels.flatten(), lengths=all_lengths)
        norm = self.latent_norm
        inputs = latents.unflatten(0, t.shape), norm.weight, norm.bias, z, t
        return kernels.flow_loss(*inputs, flow.MIN_TIME_LEFT, norm.eps, lengths)

    def _normalise(self, latents: Tensor) -> Tensor:
        # CUDA autocast runs LayerNorm in float32, CPU autocast does not: without this, z would be bfloat16 there.
        return self.latent_norm(upcast(latents))

    def decode(self, z: Tensor, lengths: Tensor | None = None) -> Any:
        """Latents [B, N, C] -> images [B, 3, S, S], not clamped, or `molecules.Atoms`."""
        return self.decoder(z) if lengths is None else self.decoder(z, lengths)

    @property
    def device(self) -> torch.device:
        return self.encoder.input_proj.weight.device
