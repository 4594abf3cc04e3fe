"""What the ops share."""

import torch
from torch import Tensor

EPS = 1e-6
"""Of the RMSNorms in the ops that make their input again: both times the same."""


def upcast(x: Tensor) -> Tensor:
    """float32 of a lower precision; float32 and float64 (the tests' truth) stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich, arXiv 1910.07467), in float32 or better."""
    x = upcast(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * upcast(weight)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift with one shift and scale a sample and channel: x [B, T, D], shift and scale [B, D]."""
    return x * (1 + upcast(scale).unsqueeze(1)) + upcast(shift).unsqueeze(1)


def mistake(op: str, message: str) -> ValueError:
    """A caller's mistake, with the op's name in front. Raise it below an `if`: a message that is made for nothing costs
    as much as a small op."""
    return ValueError(f"{op}: {message}")


def matmul_dtype(x: Tensor) -> torch.dtype:
    """What a Linear casts its input to: writing that dtype at once saves a pass over memory."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
