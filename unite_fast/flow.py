"""The straight path from noise (t = 0) to data (t = 1), and its loss (Liu et al., arXiv 2209.03003).

x_t = t z + (1 - t) e. The network predicts the clean z; the velocity that follows is (x_hat - x_t) / (1 - t).
"""

from torch import Tensor

MIN_TIME_LEFT = 0.05
"""Floor of 1 - t wherever it divides, in the loss and in sampling."""


def shift_time(s: Tensor, shift: float) -> Tensor:
    """t = a s / (1 + (a - 1) s); a < 1 spends more time near the noise (Esser et al., arXiv 2403.03206, eq. 23)."""
    return shift * s / (1 + (shift - 1) * s)


def time_left(t: Tensor) -> Tensor:
    return (1 - t).clamp_min(MIN_TIME_LEFT)


def interpolate(z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of latents z and noise, both [B, N, C], at times t [B]."""
    t = t[:, None, None]
    return t * z + (1 - t) * noise


def flow_loss(z: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
    """Mean squared error of the velocity: z and prediction [B, N, C], t [B] -> one loss a sample, float32 [B]."""
    error = (z.float() - prediction.float()) / time_left(t)[:, None, None]
    return error.square().mean(dim=(1, 2))


def velocity(x: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
    """dx/dt at x [B, N, C], a scalar time t, for the predicted clean latents."""
    return (prediction - x) / time_left(t)
