"""The joint loss of a training step (docs/method.md, "One training step"). For images and for molecules:

    L = L1(recon, image) + perceptual.weight * LPIPS(recon, image)               + objective.flow_weight * L_flow
    L = CE(elements) + molecules.position_weight * L1(recon, positions)          + objective.flow_weight * L_flow

`reconstruct` and `reconstruct_molecules` compute the first two terms, `flow_losses` the third, on detached latents. So
there are two separate backward passes, one per function; training/train_step.py runs both.

B samples of a micro-batch, N latent tokens, C latent channels, F flow draws per sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unite_fast import flow
from unite_fast.config import Config, ObjectiveConfig
from unite_fast.lpips import LPIPS
from unite_fast.model.layers import real_tokens
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


@dataclass(frozen=True)
class MicroBatch:
    """Input of one forward pass, on the training device."""

    data: Tensor
    """Images float32 [B, 3, S, S] in [0, 1], after random flips; or atoms float32 [B, N, 4] (see `UNITE.tokenize`)."""
    labels: Tensor
    """int64 [B]."""
    draws: StepDraws
    lpips_dropout: Philox | None = None
    """Random numbers of LPIPS's dropout; None: no dropout."""
    lengths: Tensor | None = None
    """Atoms of each molecule, int64 [B]; None: no pads."""
    divisor: Tensor | None = None
    """A step's losses are the sum of those of its micro-batches, each divided by its `divisor`, a float32 scalar. None:
    all micro-batches have the same size, and the losses are their mean."""


@dataclass
class Losses:
    """Means over the images, or over the atoms of all molecules; float32 scalars."""

    total: Tensor
    l1: Tensor
    """Of pixels in [0, 1], or of coordinates in Angstrom."""
    flow: Tensor
    """Summed over the F draws, without its weight."""
    lpips: Tensor
    """Zero where LPIPS is off."""
    cross_entropy: Tensor
    """Of the elements of atoms; zero for images."""
    latent_square: Tensor
    """Mean square of the latents: if it falls, the flow loss falls with it and says less."""


@dataclass
class Reconstruction:
    """Losses (see `Losses`) and latents of a micro-batch that went through tokenizer and decoder."""

    loss: Tensor
    """The weighted sum of the others, with a gradient."""
    l1: Tensor
    lpips: Tensor
    cross_entropy: Tensor
    latent_square: Tensor
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
    loss = l1 + config.perceptual.weight * perceptual
    z = z.detach()
    return Reconstruction(loss, l1.detach(), perceptual.detach(), l1.new_zeros(()), z.square().mean(), z)


def reconstruct_molecules(
    model: UNITE, atoms: Tensor, lengths: Tensor | None, draws: StepDraws, config: Config
) -> Reconstruction:
    """Tokenize molecules, decode them, and compare: means over all atoms.

    Args:
        atoms: float32 [B, N, 4], the number of the element and the position in Angstrom.
        lengths: atoms of each molecule, int64 [B]; the others are pads. None: no pads.
    """
    z = model.tokenize(atoms, draws.registers, draws.recon_time, lengths)
    decoded = model.decode(noise_decoder_input(z, draws), lengths)
    elements, positions = atoms[..., 0].long(), atoms[..., 1:]
    cross_entropy = F.cross_entropy(decoded.logits.flatten(0, 1), elements.flatten(), reduction="none")
    distance = (decoded.positions - positions).abs().mean(-1)
    cross_entropy, l1 = (mean_over_atoms(each.view(elements.shape), lengths) for each in (cross_entropy, distance))
    loss = cross_entropy + config.molecules.position_weight * l1
    z = z.detach()
    latent_square = mean_over_atoms(z.square().mean(-1), lengths)
    return Reconstruction(loss, l1.detach(), l1.new_zeros(()), cross_entropy.detach(), latent_square, z)


def mean_over_atoms(values: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean of a value per atom, [B, N], over the atoms of all molecules."""
    if lengths is None:
        return values.mean()
    return torch.where(real_tokens(lengths, values.shape[1]), values, 0.0).sum() / lengths.sum()


def noise_decoder_input(z: Tensor, draws: StepDraws) -> Tensor:
    """Latents [B, N, C], with noise where the mask is True."""
    return flow.interpolate(z, draws.decoder_noise, draws.decoder_noise_time[None], draws.decoder_noise_mask)[0]


def flow_losses(model: UNITE, z: Tensor, labels: Tensor, draws: StepDraws, lengths: Tensor | None = None) -> Tensor:
    """L_flow, unweighted: sum over the F draws of mean(((z - x_hat) / max(1 - t, flow.MIN_TIME_LEFT))^2).

    The mean is over all tokens of all samples. The F draws of all samples go through the model as one batch of F B.

    Args:
        z: clean latents [B, N, C], detached.
        labels: int64 [B].
        lengths: tokens of each sample, int64 [B]; the others are pads. None: no pads.
    """
    x_t = flow.interpolate(z, draws.flow_noise, draws.flow_time)
    labels = torch.where(draws.label_drop, model.config.num_classes, labels)
    losses = model.denoising_loss(x_t, draws.flow_time, labels, z, lengths)
    if lengths is None:
        return losses.mean() * len(draws.flow_time)
    return (losses * lengths).sum() / lengths.sum()
