"""The joint loss of a training step (docs/method.md, "One training step"):

    L = L1(recon, image) + perceptual.weight * LPIPS(recon, image) + objective.flow_weight * L_flow

`reconstruct` computes the first two terms, `flow_losses` the third, on detached latents. So there are two separate
backward passes, one per function; training/train_step.py runs both.

B images of a micro-batch, N latent tokens, C latent channels, F flow draws per image.
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
    """All random numbers of one step except LPIPS dropout. Noise is given as keys in training, where kernels draw it,
    and as tensors in a trace or a test."""

    registers: Tensor
    """N(0, 1), [B, N, C]."""
    recon_time: Tensor
    """Time of the tokenizer pass, [B]."""
    decoder_noise_mask: Tensor
    """Samples whose latents get noise before the decoder, bool [B]."""
    decoder_noise_time: Tensor
    """Time of that noise, [B]."""
    decoder_noise: Tensor | NoiseKeys
    """N(0, 1), [B, N, C]."""
    flow_time: Tensor
    """Times of the flow draws, [F, B]."""
    flow_noise: Tensor | NoiseKeys
    """N(0, 1), [F, B, N, C]."""
    label_drop: Tensor
    """Flow draws whose label becomes "no class", bool [F, B]."""


def draw_step(config: ObjectiveConfig, philox: Philox, latents: tuple[int, int]) -> StepDraws:
    """The draws for the step and samples of `philox`; `latents` is (N, C)."""
    time_min = config.decoder_noise_time_min
    normal_time = philox.normal(Stream.FLOW_TIME, draw=range(config.flow_draws))
    return StepDraws(
        registers=philox.normal(Stream.REGISTERS, latents),
        recon_time=config.tokenize_time_max * philox.uniform(Stream.RECON_TIME),
        decoder_noise_mask=philox.uniform(Stream.DECODER_NOISE_MASK) < config.decoder_noise_probability,
        decoder_noise_time=time_min + (1 - time_min) * philox.uniform(Stream.DECODER_NOISE_TIME),
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
    """Summed over the F draws, without its weight."""
    lpips: Tensor
    """Zero where LPIPS is off."""


@dataclass
class Reconstruction:
    """Losses and latents of a micro-batch that went through tokenizer and decoder."""

    loss: Tensor
    """l1 + perceptual.weight * lpips, with a gradient."""
    l1: Tensor
    lpips: Tensor
    z: Tensor
    """Clean latents [B, N, C], detached."""


def reconstruct(
    model: UNITE,
    images: Tensor,
    draws: StepDraws,
    config: Config,
    lpips: LPIPS | None = None,
    lpips_dropout: Philox | None = None,
) -> Reconstruction:
    """Tokenize images [B, 3, S, S] in [0, 1], decode them, and compare.

    Args:
        lpips_dropout: random numbers of LPIPS's dropout; None: no dropout.
    """
    z = model.tokenize(images, draws.registers, draws.recon_time)
    recon = model.decode(noise_decoder_input(z, draws)).float()
    l1 = (recon - images).abs().mean()
    perceptual = l1.new_zeros(()) if lpips is None else lpips(images, recon, lpips_dropout).mean()
    return Reconstruction(l1 + config.perceptual.weight * perceptual, l1.detach(), perceptual.detach(), z.detach())


def noise_decoder_input(z: Tensor, draws: StepDraws) -> Tensor:
    """Latents [B, N, C], with noise where the mask is True."""
    return flow.interpolate(z, draws.decoder_noise, draws.decoder_noise_time[None], draws.decoder_noise_mask)[0]


def flow_losses(model: UNITE, z: Tensor, labels: Tensor, draws: StepDraws) -> Tensor:
    """L_flow, unweighted: sum over the F draws of mean(((z - x_hat) / max(1 - t, flow.MIN_TIME_LEFT))^2).

    The F draws of all samples go through the model as one batch of F B.

    Args:
        z: clean latents [B, N, C], detached.
        labels: int64 [B].
    """
    x_t = flow.interpolate(z, draws.flow_noise, draws.flow_time)
    labels = torch.where(draws.label_drop, model.config.num_classes, labels)
    return model.denoising_loss(x_t, draws.flow_time, labels, z).mean() * len(draws.flow_time)
