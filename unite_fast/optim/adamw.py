"""AdamW for what Muon does not take: torch's fused one, or NVIDIA apex's where it was asked for."""

from collections.abc import Iterable

import torch
from torch import Tensor

from unite_fast.errors import UserError


def adamw(
    implementation: str, parameters: Iterable[Tensor], betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """AdamW without weight decay; its learning rate is set before each step.

    Raises:
        UserError: apex is asked for and not installed.
    """
    if implementation == "torch":
        return torch.optim.AdamW(parameters, 0.0, betas, eps, weight_decay=0.0, fused=True)
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise UserError(
            "optim.adamw is apex, but NVIDIA apex is not installed here (apex on the package index is something else); "
            "build it from github.com/NVIDIA/apex, or set optim.adamw=torch"
        ) from error
    return FusedAdam(list(parameters), lr=0.0, betas=betas, eps=eps, adam_w_mode=True, weight_decay=0.0)
