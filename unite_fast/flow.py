"""The straight path from noise (t = 0) to data (t = 1), and its loss (Liu et al., arXiv 2209.03003).

x_t = t z + (1 - t) e. The network predicts the clean z; the velocity that follows is (x_hat - x_t) / (1 - t).
"""

from torch import Tensor

from unite_fast import kernels
from unite_fast.kernels.noise_injection import mix
from unite_fast.randomness import NoiseKeys

MIN_TIME_LEFT = 0.05
"""Floor of 1 - t wherever it divides, in the loss and in sampling."""


def shift_time(s: Tensor, shift: float) -> Tensor:
    """t = a s / (1 + (a - 1) s); a < 1 spends more time near the noise (Esser et al., arXiv 2403.03206, eq. 23)."""
    return shift * s / (1 + (shift - 1) * s)


def interpolate(z: Tensor, noise: Tensor | NoiseKeys, t: Tensor, gate: Tensor | None = None) -> Tensor:
    """x_t of latents [B, N, C] at F times each, t [F, B] -> [F, B, N, C].

    Args:
        noise: numbers that broadcast to [F, B, N, C], or keys, whose draw f belongs to F's f-th.
        gate: bool [B]; a sample whose gate is shut stays as it is.
    """
    if isinstance(noise, NoiseKeys):
        return kernels.noise_injection(z, t, noise.philox, noise.stream, gate)
    return mix(z, t, noise, gate)
