"""Muon: momentum, orthogonalised (Jordan et al., https://kellerjordan.github.io/posts/muon).

    m <- lerp(m, g, 1 - momentum)
    u  = newton_schulz(lerp(g, m, momentum))          (Nesterov)
    w <- w - lr * 0.2 sqrt(max(rows, columns)) * u    (RMS of AdamW's update: Liu et al., arXiv 2502.16982)

Matrices of one shape go through Newton-Schulz as one batch: a few large products instead of many small ones. Where many
processes train together, each of them has a share of the matrices to do.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from unite_fast.distributed.dtensor import local
from unite_fast.kernels.matmul import in_float32
from unite_fast.optim.sharded_matrices import Exchange, layout

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def newton_schulz(g: Tensor, eps: float) -> Tensor:
    """Push the singular values of matrices towards 1: [n, rows, columns] -> the same shape and precision.

    Five steps of the quintic X <- aX + bAX + cA(AX) with A = X X^T. They end near 1 (0.7 to 1.2), not at 1.
    """
    # A dispatch mode counts it as one operator; for nobody else is that worth its 200 us a call.
    return (_operator if torch._C._len_torch_dispatch_stack() else _newton_schulz)(g, eps)


def _newton_schulz(g: Tensor, eps: float) -> Tensor:
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


_operator = torch.library.custom_op("unite_fast::newton_schulz", _newton_schulz, mutates_args=())
_operator.register_fake(lambda g, eps: torch.empty_like(g))


def newton_schulz_flops(shape: Sequence[int]) -> int:
    """Floating-point operations of `newton_schulz` on one matrix: 5 (4 m^2 n + 2 m^3) for sides m <= n.

    A product of [a, b] and [b, c] counts 2abc. An iteration takes X X^T (2 m^2 n), A A (2 m^3) and B X (2 m^2 n).
    """
    m, n = sorted(shape)
    return ITERATIONS * (4 * m * m * n + 2 * m**3)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the precision dtype, stored as float32 where products of it are faster so (see kernels/matmul.py)."""
    x = x.to(dtype)
    return x.float() if in_float32(x) else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and no weight decay for parameters of two dimensions.

    The parameters are plain tensors (one process), or DTensors as `fully_shard` on a mesh (copies, shards) makes them:
    momentum stays cut as they are, each matrix goes through Newton-Schulz on one process alone (see exchange.py), and
    the update is what one process would have made, up to the rounding of sums.

    Args:
        parameters: matrices, at their true shapes: the update's scale follows from it. Those without a gradient, the
            same ones on all processes, are left alone.
        lr: learning rate of AdamW's scale.
        momentum: decay of the momentum.
        eps: floor of the norm that a gradient is divided by.
        dtype: precision of the Newton-Schulz products, and of what travels between processes.

    Attributes:
        found_inf: None, or a float32 scalar on the parameters' device, the same on all processes. Where it is 1, `step`
            leaves parameters and momenta as they are, whatever the gradients hold; nothing waits to learn its value.
    """

    def __init__(self, parameters, lr: float, momentum: float, eps: float, dtype: torch.dtype):
        super().__init__(parameters, dict(lr=lr))
        self.momentum, self.eps, self.dtype = momentum, eps, dtype
        self.found_inf: Tensor | None = None
        for parameter in self._parameters():
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        self._exchanges: dict[tuple[int, ...], Exchange] = {}

    @torch.no_grad()
    def step(self) -> None:
        parameters = self._parameters()
        used = tuple(k for k, p in enumerate(parameters) if p.grad is not None)
        if not used:
            return
        parameters = [parameters[k] for k in used]
        if used not in self._exchanges:
            self._exchanges[used] = exchange(parameters)
        way = self._exchanges[used]
        directions = self._directions(parameters, way.supplied)
        device = local(parameters[0]).device
        updates = way.apply(lambda batch: newton_schulz(batch, self.eps), directions, self.dtype, device)
        if self.found_inf is not None:
            torch._foreach_mul_(updates, (1 - self.found_inf).to(self.dtype))
        self._move(dict(zip(parameters, updates, strict=True)))

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _directions(self, parameters: list[Tensor], wanted: list[int]) -> dict[int, Tensor]:
        """Let all momenta follow the gradients. Where both together point, as it is cut, for the parameters wanted."""
        gradients = [local(p.grad) for p in parameters]
        momenta = [local(self.state[p]["momentum"]) for p in parameters]
        if self.found_inf is not None:
            # A product with zero would keep a NaN. Towards itself, the momentum does not move by a single bit.
            skip = self.found_inf.bool()
            gradients = [torch.where(skip, m, g) for g, m in zip(gradients, momenta, strict=True)]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        if not wanted:
            return {}
        directions = torch._foreach_lerp([gradients[k] for k in wanted], [momenta[k] for k in wanted], self.momentum)
        return dict(zip(wanted, directions, strict=True))

    def _move(self, updates: dict[Tensor, Tensor]) -> None:
        for group in self.param_groups:
            same_scale = defaultdict(list)
            for p in group["params"]:
                if p in updates:
                    same_scale[max(p.shape)].append(p)
            for side, parameters in same_scale.items():
                moved, by = [local(p) for p in parameters], [updates[p] for p in parameters]
                torch._foreach_add_(moved, by, alpha=-group["lr"] * 0.2 * side**0.5)


def exchange(parameters: list[Tensor]) -> Exchange:
    """The way of parameters through Newton-Schulz, by what it costs on each."""
    grid, matrices = layout(parameters)
    return Exchange(matrices, [newton_schulz_flops(matrix.shape) for matrix in matrices], grid)
