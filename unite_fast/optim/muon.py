"""Muon: momentum, orthogonalised (Jordan et al., https://kellerjordan.github.io/posts/muon).

    m <- lerp(m, g, 1 - momentum)
    u  = newton_schulz(lerp(g, m, momentum))          (Nesterov)
    w <- w - lr * 0.2 sqrt(max(rows, columns)) * u    (RMS of AdamW's update: Liu et al., arXiv 2502.16982)

Matrices of one shape go through Newton-Schulz as one batch: a few large products instead of many small ones.
"""

from collections import defaultdict

import torch
from torch import Tensor

from unite_fast.kernels.product import in_float32

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


@torch.library.custom_op("unite_fast::newton_schulz", mutates_args=())
def newton_schulz(g: Tensor, eps: float) -> Tensor:
    """Push the singular values of matrices towards 1: [n, rows, columns] -> the same shape and precision.

    Five steps of the quintic X <- aX + bAX + cA(AX) with A = X X^T. They end near 1 (0.7 to 1.2), not at 1.
    """
    wide = g.shape[-2] <= g.shape[-1]
    x = g if wide else g.mT
    x = rounded(x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(eps), g.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = rounded(x @ x.mT, g.dtype)
        polynomial = rounded(torch.baddbmm(gram, gram, gram, beta=b, alpha=c), g.dtype)
        x = rounded(torch.baddbmm(x, polynomial, x, beta=a), g.dtype)
    x = x.to(g.dtype)
    return x if wide else x.mT.contiguous()


@newton_schulz.register_fake
def _(g: Tensor, eps: float) -> Tensor:
    return torch.empty_like(g)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the precision dtype, stored as float32 where products of it are faster so (see kernels/product.py)."""
    x = x.to(dtype)
    return x.float() if in_float32(x) else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and no weight decay for parameters of two dimensions.

    Args:
        parameters: matrices.
        lr: learning rate of AdamW's scale.
        momentum: decay of the momentum.
        eps: floor of the norm that a gradient is divided by.
        dtype: precision of the Newton-Schulz products.
    """

    def __init__(self, parameters, lr: float, momentum: float, eps: float, dtype: torch.dtype):
        super().__init__(parameters, dict(lr=lr))
        self.momentum, self.eps, self.dtype = momentum, eps, dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same_shape[p.shape].append(p)
            for shape, parameters in same_shape.items():
                update = self._updates(parameters)
                torch._foreach_add_(parameters, update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

    def _updates(self, parameters: list[Tensor]) -> list[Tensor]:
        gradients = [p.grad for p in parameters]
        momenta = [self._momentum_of(p) for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        directions = torch._foreach_lerp(gradients, momenta, self.momentum)
        batch = directions[0].new_empty((len(directions), *directions[0].shape), dtype=self.dtype)
        torch._foreach_copy_(list(batch), directions)
        return list(newton_schulz(batch, self.eps))

    def _momentum_of(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]
