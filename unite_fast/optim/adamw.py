"""AdamW for the parameters that Muon does not train: torch's fused AdamW, or NVIDIA apex's (`optim.adamw`)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from unite_fast.errors import UserError


def adamw(
    implementation: str, parameters: Iterable[Tensor], betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """AdamW without weight decay. `TrainState` sets its learning rate before each step.

    Args:
        implementation: "torch" or "apex".

    Raises:
        UserError: apex is not installed.
    """
    if implementation == "torch":
        return torch.optim.AdamW(parameters, 0.0, betas, eps, weight_decay=0.0, fused=True)
    try:
        from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]  # optional, built from source
    except ImportError as error:
        raise UserError(
            "optim.adamw is apex, but NVIDIA apex is not installed here (apex on the package index is something else); "
            "build it from github.com/NVIDIA/apex, or set optim.adamw=torch"
        ) from error
    return FusedAdam(list(parameters), lr=0.0, betas=betas, eps=eps, adam_w_mode=True, weight_decay=0.0)
