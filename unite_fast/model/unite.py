"""UNITE: the Generative Encoder, a LayerNorm on its latents, and the pixel decoder.

The forward passes never call a random generator: every draw is an argument.
"""

import torch
from torch import Tensor, nn

from unite_fast import flow, kernels
from unite_fast.config import ModelConfig
from unite_fast.distributed.dtensor import local
from unite_fast.kernels.tensors import upcast
from unite_fast.model.decoder import Decoder
from unite_fast.model.generative_encoder import GenerativeEncoder
from unite_fast.model.layers import fill


class UNITE(nn.Module):
    """B batch, N latent tokens, C latent channels, S image size."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = GenerativeEncoder(config)
        self.latent_norm = nn.LayerNorm(config.latent_channels)
        self.decoder = Decoder(config)

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
            fill(self.latent_norm.weight, nn.init.ones_)
            fill(self.latent_norm.bias, nn.init.zeros_)
            self.decoder.initialize(generator)
            for name, tensor in tensors.items():
                if local(tensor)._version == versions[name]:
                    raise RuntimeError(f"UNITE.initialize does not set {name}; set it in its module's initialize()")

    def tokenize(self, images: Tensor, registers: Tensor, t: Tensor) -> Tensor:
        """images [B, 3, S, S] in [0, 1], registers ~ N(0, 1) [B, N, C], t ~ U(0, 0.01) [B] -> latents [B, N, C]."""
        no_class = torch.full((len(images),), self.config.num_classes, device=images.device)
        return self._normalise(self.encoder(registers, t, no_class, images))

    def denoise(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Predict clean latents: x_t [B, N, C], t [B], labels int64 [B] (num_classes means none) -> [B, N, C]."""
        return self._normalise(self.encoder(x_t, t, labels))

    def denoising_loss(self, x_t: Tensor, t: Tensor, labels: Tensor, z: Tensor) -> Tensor:
        """The flow loss of `denoise` in one kernel, without the predicted latents in memory.

        Per sample: mean over N and C of ((x_hat - z) / max(1 - t, MIN_TIME_LEFT))^2, the error of the velocity.

        Args:
            x_t: F noisy versions of every sample's latents, [F, B, N, C].
            t: their times, [F, B].
            labels: int64 [F, B].
            z: the clean latents, [B, N, C], without a gradient.

        Returns:
            float32 [F, B].
        """
        latents = self.encoder(x_t.flatten(0, 1), t.flatten(), labels.flatten()).unflatten(0, t.shape)
        norm = self.latent_norm
        return kernels.flow_loss(latents, norm.weight, norm.bias, z, t, flow.MIN_TIME_LEFT, norm.eps)

    def _normalise(self, latents: Tensor) -> Tensor:
        # CUDA autocast runs LayerNorm in float32, CPU autocast does not: without this, z would be bfloat16 there.
        return self.latent_norm(upcast(latents))

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, N, C] -> images [B, 3, S, S], not clamped."""
        return self.decoder(z)

    @property
    def device(self) -> torch.device:
        return self.latent_norm.weight.device
