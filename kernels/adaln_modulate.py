"""adaln_modulate: RMSNorm, weight, scale and shift.

    out = x / sqrt(mean(x^2) + eps) * weight * (1 + scale) + shift

Shapes: x [B, T, D], weight [D], shift and scale [B, D] -> out [B, T, D]. The mean and all products are float32.
Source: adaLN of DiT (Peebles and Xie, arXiv 2212.09748) on RMSNorm.
"""

import torch
from torch import Tensor

from unite_fast.kernels.common import check, modulate, rms_norm


def adaln_modulate(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Normalise and modulate; see the module's docstring. The result has `out_dtype`, or x's own.

    Raises:
        ValueError: shapes that do not belong together.
    """
    check_modulation("adaln_modulate", x, weight, shift, scale)
    return adaln_modulate_ref(x, weight, shift, scale, eps, out_dtype)


def adaln_modulate_ref(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    return modulate(rms_norm(x, weight, eps), shift, scale).to(out_dtype or x.dtype)


def check_modulation(op: str, x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> None:
    check(x.dim() == 3, op, f"x must be [B, T, D], got {list(x.shape)}")
    b, _, d = x.shape
    check(weight.shape == (d,), op, f"weight must be [{d}], got {list(weight.shape)}")
    for name, tensor in (("shift", shift), ("scale", scale)):
        check(tensor.shape == (b, d), op, f"{name} must be [{b}, {d}], got {list(tensor.shape)}")
