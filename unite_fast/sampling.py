"""Generation: solve dx/dt = (x_hat - x) / (1 - t) from noise at t = 0 to latents at t = 1, then decode.

B samples, N latent tokens, C latent channels, S image size.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torchdiffeq import odeint

from unite_fast import flow
from unite_fast.config import SamplingConfig, require
from unite_fast.model.unite import UNITE
from unite_fast.randomness import Philox, Stream

DOPRI5_RTOL, DOPRI5_ATOL = 1e-3, 1e-6
"""The released code's tolerances."""

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(t, x [B, N, C]) -> dx/dt [B, N, C]."""


@dataclass
class GuidedVelocity:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), active inside an interval of times (Kynkaanniemi et
    al., arXiv 2404.07724)."""

    model: UNITE
    labels: Tensor
    """int64 [B]."""
    config: SamplingConfig
    evaluations: int = 0
    """Network passes so far, in units of one batch of B samples."""

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return flow.velocity(x, self._prediction(t, x), t)

    def _prediction(self, t: Tensor, x: Tensor) -> Tensor:
        conditional = self.labels
        if not self._guided_at(float(t)):
            return self._predict(t, x, conditional)
        unconditional = torch.full_like(conditional, self.model.config.num_classes)
        both = self._predict(t, torch.cat((x, x)), torch.cat((conditional, unconditional)))
        with_label, without = both.chunk(2)
        return without + self.config.guidance * (with_label - without)

    def _guided_at(self, t: float) -> bool:
        low, high = self.config.interval
        return self.config.guidance != 1.0 and t < high and (low == 0 or t > low)

    def _predict(self, t: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        self.evaluations += len(x) // len(self.labels)
        times = t.to(torch.float32).expand(len(x))
        if self.config.order == "cfg_first":
            return self.model.encoder(x, times, labels)
        return self.model.denoise(x, times, labels)


def euler(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    for t, following in pairwise(times):
        x = x + (following - t) * velocity(t, x)
    return x


def heun(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """The explicit trapezoid rule, second order."""
    for t, following in pairwise(times):
        step = following - t
        slope = velocity(t, x)
        x = x + step / 2 * (slope + velocity(following, x + step * slope))
    return x


def dopri5(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Adaptive Runge-Kutta 5(4) of torchdiffeq. The grid between its ends has no say in the result."""
    return odeint(velocity, x, times[[0, -1]], rtol=DOPRI5_RTOL, atol=DOPRI5_ATOL, method="dopri5")[-1]


SOLVERS = {"euler": euler, "heun": heun, "dopri5": dopri5}


@torch.no_grad()
def generate_latents(model: UNITE, labels: Tensor, noise: Tensor, config: SamplingConfig) -> Tensor:
    """labels int64 [B], noise ~ N(0, 1) float32 [B, N, C] -> latents float32 [B, N, C]."""
    times = flow.shift_time(torch.linspace(0, 1, config.steps + 1, device=noise.device), config.time_shift)
    return SOLVERS[config.solver](GuidedVelocity(model, labels, config), noise, times)


@torch.no_grad()
def generate(
    model: UNITE, labels: Tensor, config: SamplingConfig, seed: int = 0, batch: int = 64, first: int = 0
) -> Tensor:
    """Images of the given classes.

    Sample i's noise depends on (seed, first + i) alone, so the batch size does not change what is drawn.

    Args:
        labels: int64 [n], in 0..num_classes - 1.

    Returns:
        uint8 [n, 3, S, S] on the CPU.

    Raises:
        UserError: a label that is no class.
    """
    check_classes(labels.tolist(), model.config.num_classes)
    shape = (model.config.latent_tokens, model.config.latent_channels)
    images = []
    for start in range(0, len(labels), batch):
        part = labels[start : start + batch].to(model.device)
        positions = torch.arange(first + start, first + start + len(part), device=model.device)
        noise = Philox(seed, 0, positions).normal(Stream.SAMPLE_NOISE, shape)
        images.append(to_uint8(model.decode(generate_latents(model, part, noise, config))))
    return torch.cat(images)


def check_classes(labels: Iterable[int], num_classes: int) -> None:
    for label in labels:
        require(0 <= label < num_classes, f"class {label} is out of range: this model has classes 0..{num_classes - 1}")


@torch.no_grad()
def reconstruct(model: UNITE, images: Tensor, seed: int = 0, batch: int = 64, first: int = 0) -> Tensor:
    """Images through tokenizer and decoder: uint8 [n, 3, S, S] -> uint8 [n, 3, S, S] on the CPU.

    The registers are drawn as in training, image i's from (seed, first + i); the tokenizer's time is 0.
    """
    shape = (model.config.latent_tokens, model.config.latent_channels)
    out = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch].to(model.device).float() / 255
        positions = torch.arange(first + start, first + start + len(part), device=model.device)
        registers = Philox(seed, 0, positions).normal(Stream.REGISTERS, shape)
        z = model.tokenize(part, registers, part.new_zeros(len(part)))
        out.append(to_uint8(model.decode(z)))
    return torch.cat(out)


def to_uint8(images: Tensor) -> Tensor:
    """Clamp to [0, 1] and truncate, as the released code does: [..., S, S] -> uint8 on the CPU."""
    return (images.float().clamp(0, 1) * 255).to(torch.uint8).cpu()
