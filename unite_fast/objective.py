"""The two losses of a training step (spec: "One training step"); training/train_step.py puts them together.

B images of a micro-batch, N latent tokens, C latent channels, F flow draws an image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from unite_fast import flow
from unite_fast.config import Config, ObjectiveConfig
from unite_fast.lpips import LPIPS
from unite_fast.model.unite import UNITE
from unite_fast.randomness import NoiseKeys, Philox, Stream


@dataclass
class StepDraws:
    """Every random number of one step but the LPIPS dropout. Noise that a kernel can draw where it uses it comes as the
    keys to draw it from, in training; as numbers where they are given: in a trace, in a test."""

    registers: Tensor
    """N(0, 1), [B, N, C]."""
    recon_time: Tensor
    """Time of the tokenizer pass, [B]."""
    decoder_noise_mask: Tensor
    """Whose latents the decoder gets noisy, bool [B]."""
    decoder_noise_time: Tensor
    """[B]."""
    decoder_noise: Tensor | NoiseKeys
    """N(0, 1), [B, N, C]."""
    flow_time: Tensor
    """[F, B]."""
    flow_noise: Tensor | NoiseKeys
    """N(0, 1), [F, B, N, C]."""
    label_drop: Tensor
    """Whose label becomes "no class", bool [F, B]."""


def draw_step(config: ObjectiveConfig, philox: Philox, latents: tuple[int, int]) -> StepDraws:
    """The draws of `philox`'s step and samples; `latents` is (N, C)."""
    noisy_from = config.decoder_noise_time_min
    normal_time = philox.normal(Stream.FLOW_TIME, draw=range(config.flow_draws))
    return StepDraws(
        registers=philox.normal(Stream.REGISTERS, latents),
        recon_time=config.tokenize_time_max * philox.uniform(Stream.RECON_TIME),
        decoder_noise_mask=philox.uniform(Stream.DECODER_NOISE_MASK) < config.decoder_noise_probability,
        decoder_noise_time=noisy_from + (1 - noisy_from) * philox.uniform(Stream.DECODER_NOISE_TIME),
        decoder_noise=NoiseKeys(philox, Stream.DECODER_NOISE),
        flow_time=flow.shift_time(torch.sigmoid(config.time_mean + config.time_std * normal_time), config.time_shift),
        flow_noise=NoiseKeys(philox, Stream.FLOW_NOISE),
        label_drop=philox.uniform(Stream.LABEL_DROP, draw=range(config.flow_draws)) < config.label_drop,
    )


@dataclass
class Losses:
    """Means over the micro-batch, float32 scalars."""

    total: Tensor
    l1: Tensor
    flow: Tensor
    """Sum over the F draws."""
    lpips: Tensor
    """Zero where LPIPS is off."""


@dataclass
class Reconstruction:
    """What the tokenizer and the decoder make of a micro-batch."""

    loss: Tensor
    """l1 + perceptual.weight lpips: gradient flows from here."""
    l1: Tensor
    lpips: Tensor
    z: Tensor
    """The clean latents [B, N, C], without a gradient."""


def reconstruct(
    model: UNITE,
    images: Tensor,
    draws: StepDraws,
    config: Config,
    lpips: LPIPS | None = None,
    lpips_dropout: list[Tensor] | None = None,
) -> Reconstruction:
    z = model.tokenize(images, draws.registers, draws.recon_time)
    recon = model.decode(noise_decoder_input(z, draws)).float()
    l1 = (recon - images).abs().mean()
    perceptual = l1.new_zeros(()) if lpips is None else lpips(images, recon, lpips_dropout).mean()
    return Reconstruction(l1 + config.perceptual.weight * perceptual, l1.detach(), perceptual.detach(), z.detach())


def noise_decoder_input(z: Tensor, draws: StepDraws) -> Tensor:
    """Latents [B, N, C], those under the mask mixed with noise."""
    return flow.interpolate(z, draws.decoder_noise, draws.decoder_noise_time[None], draws.decoder_noise_mask)[0]


def flow_losses(model: UNITE, z: Tensor, labels: Tensor, draws: StepDraws) -> Tensor:
    """Sum over the F draws of the mean loss over the batch, for latents z [B, N, C] without a gradient. The draws share
    one forward pass, as F B samples."""
    x_t = flow.interpolate(z, draws.flow_noise, draws.flow_time)
    labels = torch.where(draws.label_drop, model.config.num_classes, labels)
    return model.denoising_loss(x_t, draws.flow_time, labels, z).mean() * len(draws.flow_time)
