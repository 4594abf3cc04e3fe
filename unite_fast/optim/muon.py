"""Muon: momentum, orthogonalised (Jordan et al., https://kellerjordan.github.io/posts/muon).

    m <- lerp(m, g, 1 - momentum)
    u  = newton_schulz(lerp(g, m, momentum))          (Nesterov)
    w <- w - lr * 0.2 sqrt(max(rows, columns)) * u    (RMS of AdamW's update: Liu et al., arXiv 2502.16982)

Matrices of one shape go through Newton-Schulz as one batch: a few large products instead of many small ones.
"""

from collections import defaultdict

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def newton_schulz(g: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Push the singular values of matrices towards 1: [n, rows, columns] -> the same shape, in `dtype`.

    Five steps of the quintic X <- aX + bAX + cA(AX) with A = X X^T. They end near 1 (0.7 to 1.2), not at 1.
    """
    x = g.to(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    if not wide:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(eps)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x if wide else x.mT


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
        orthogonal = newton_schulz(torch.stack(directions), self.eps, self.dtype)
        return list(orthogonal.to(parameters[0].dtype).unbind(0))

    def _momentum_of(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]
