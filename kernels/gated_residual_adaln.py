"""gated_residual_adaln: the middle of a block.

    x_out = x + gate * branch
    h     = adaln_modulate(x_out, weight, shift, scale)

Shapes: x and branch [B, T, D], gate, shift and scale [B, D], weight [D] -> x_out [B, T, D] in x's dtype, h [B, T, D].
All arithmetic is float32.
"""

import torch
from torch import Tensor

from unite_fast.kernels.adaln_modulate import adaln_modulate_ref, check_modulation
from unite_fast.kernels.common import check, upcast


def gated_residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the gated branch, then normalise and modulate; see the module's docstring. h has `out_dtype`, or x's own.

    Raises:
        ValueError: shapes that do not belong together.
    """
    check_modulation("gated_residual_adaln", x, weight, shift, scale)
    check_branch("gated_residual_adaln", x, branch, gate)
    return gated_residual_adaln_ref(x, branch, gate, weight, shift, scale, eps, out_dtype)


def gated_residual_adaln_ref(x, branch, gate, weight, shift, scale, eps=1e-6, out_dtype=None):
    x = gated_residual(x, branch, gate).to(x.dtype)
    return x, adaln_modulate_ref(x, weight, shift, scale, eps, out_dtype)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return upcast(x) + upcast(gate).unsqueeze(1) * upcast(branch)


def check_branch(op: str, x: Tensor, branch: Tensor, gate: Tensor) -> None:
    b, _, d = x.shape
    check(branch.shape == x.shape, op, f"branch must be {list(x.shape)} like x, got {list(branch.shape)}")
    check(gate.shape == (b, d), op, f"gate must be [{b}, {d}], got {list(gate.shape)}")
