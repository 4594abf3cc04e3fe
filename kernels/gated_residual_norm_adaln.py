"""gated_residual_norm_adaln: the boundary between two blocks.

    x_out = rms_norm(x + gate * branch, norm_weight)
    h     = adaln_modulate(x_out, weight, shift, scale)

Shapes: x and branch [B, T, D], gate, shift and scale [B, D], norm_weight and weight [D] -> x_out [B, T, D] in x's
dtype, h [B, T, D]. `norm_weight` is norm3 of the block that ends; `weight`, `shift` and `scale` belong to norm1 of the
block that begins, or to the final layer. All arithmetic is float32.
"""

import torch
from torch import Tensor

from unite_fast.kernels.adaln_modulate import adaln_modulate_ref, check_modulation
from unite_fast.kernels.common import check, rms_norm
from unite_fast.kernels.gated_residual_adaln import check_branch, gated_residual


def gated_residual_norm_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """End one block and begin the next; see the module's docstring. h has `out_dtype`, or x's own.

    Raises:
        ValueError: shapes that do not belong together.
    """
    op = "gated_residual_norm_adaln"
    check_modulation(op, x, weight, shift, scale)
    check_branch(op, x, branch, gate)
    check(norm_weight.shape == weight.shape, op, f"norm_weight must be {list(weight.shape)}")
    return gated_residual_norm_adaln_ref(x, branch, gate, norm_weight, weight, shift, scale, eps, out_dtype)


def gated_residual_norm_adaln_ref(x, branch, gate, norm_weight, weight, shift, scale, eps=1e-6, out_dtype=None):
    x = rms_norm(gated_residual(x, branch, gate), norm_weight, eps).to(x.dtype)
    return x, adaln_modulate_ref(x, weight, shift, scale, eps, out_dtype)
