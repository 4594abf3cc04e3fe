"""The straight path from noise e (t = 0) to data z (t = 1): x_t = t z + (1 - t) e (Liu et al., arXiv 2209.03003).

The network predicts the clean z; its velocity is (x_hat - x_t) / (1 - t). The flow loss is `objective.flow_losses`.
"""

from torch import Tensor

from unite_fast import kernels
from unite_fast.kernels.noise_injection import mix
from unite_fast.randomness import NoiseKeys

MIN_TIME_LEFT = 0.05
"""Lower bound of 1 - t as a divisor, in the loss and in sampling."""


def shift_time(s: Tensor, shift: float) -> Tensor:
    """t = a s / (1 + (a - 1) s); a < 1 spends more time near the noise (Esser et al., arXiv 2403.03206, eq. 23)."""
    return shift * s / (1 + (shift - 1) * s)


def interpolate(z: Tensor, noise: Tensor | NoiseKeys, t: Tensor, gate: Tensor | None = None) -> Tensor:
    """x_t = t z + (1 - t) e: latents z [B, N, C] at F times each, t [F, B] -> [F, B, N, C].

    In training, the noise is a function of (seed, step, position in the global batch), not a tensor: the kernel
    computes it where it is used, so it never goes through memory, and 1 process or 64 draw the same numbers.

    Args:
        noise: the keys of that function; or a tensor that broadcasts to [F, B, N, C], for a trace or a test.
        gate: bool [B]; where it is False, the sample stays clean.
    """
    if isinstance(noise, NoiseKeys):
        return kernels.noise_injection(z, t, noise.philox, noise.stream, gate)
    return mix(z, t, noise, gate)
