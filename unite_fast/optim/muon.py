"""Muon: momentum, orthogonalised (Jordan et al., https://kellerjordan.github.io/posts/muon).

    m <- lerp(m, g, 1 - momentum)
    u  = newton_schulz(lerp(g, m, momentum))          (Nesterov)
    w <- w - lr * 0.2 sqrt(max(rows, columns)) * u    (RMS of AdamW's update: Liu et al., arXiv 2502.16982)

Matrices of one shape go through Newton-Schulz as one batch: a few large matmuls instead of many small ones. With
several ranks, each matrix is computed on one of them (sharded_matrices.py).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unite_fast.distributed.dtensor import local
from unite_fast.kernels.matmul import in_float32
from unite_fast.optim.sharded_matrices import ShardedMap, layout

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def newton_schulz(g: Tensor, eps: float) -> Tensor:
    """Push the singular values of matrices towards 1: [n, rows, columns] -> the same shape and dtype.

    Five steps of the quintic X <- aX + bAX + cA(AX) with A = X X^T. The values end between 0.7 and 1.2.

    Args:
        eps: floor of the Frobenius norm by which each matrix is divided first.
    """
    # The custom op adds 200 us per call. It serves dispatch modes (FLOP counters) alone, which then see one operator.
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
    return x if wide else x.mT


@torch.library.custom_op("unite_fast::newton_schulz", mutates_args=())
def _operator(g: Tensor, eps: float) -> Tensor:
    return _newton_schulz(g, eps).contiguous()


_operator.register_fake(lambda g, eps: torch.empty_like(g))


def newton_schulz_flops(shape: Sequence[int]) -> int:
    """Floating-point operations of `newton_schulz` on one matrix: 5 (4 m^2 n + 2 m^3) for sides m <= n.

    A matmul of [a, b] and [b, c] counts 2abc. An iteration takes X X^T (2 m^2 n), A A (2 m^3) and B X (2 m^2 n).
    """
    m, n = sorted(shape)
    return ITERATIONS * (4 * m * m * n + 2 * m**3)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to `dtype`; stored as float32 where matmuls of it are faster that way (see kernels/matmul.py)."""
    x = x.to(dtype)
    return x.float() if in_float32(x) else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and without weight decay, for two-dimensional parameters.

    The parameters are plain tensors (one process) or DTensors that `fully_shard` made on a (replicas, shards) mesh.
    Momentum is sharded like them; Newton-Schulz runs on whole matrices. The update equals that of one process up to the
    rounding of sums.

    Args:
        parameters: matrices in their original shapes, which set the scale of the update. `step` skips those without a
            gradient; they must be the same on all ranks.
        lr: learning rate, on AdamW's scale.
        momentum: decay of the momentum.
        eps: see `newton_schulz`.
        dtype: precision of the Newton-Schulz matmuls and of the communication.

    Attributes:
        found_inf: None, or a float32 scalar on the parameters' device, the same on all ranks. If it is 1, `step`
            changes neither parameters nor momenta. The host does not wait for its value.
    """

    def __init__(self, parameters, lr: float, momentum: float, eps: float, dtype: torch.dtype):
        super().__init__(parameters, dict(lr=lr))
        self.momentum, self.eps, self.dtype = momentum, eps, dtype
        self.found_inf: Tensor | None = None
        for parameter in self._parameters():
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        self._sharded_maps: dict[tuple[int, ...], ShardedMap] = {}

    @torch.no_grad()
    def step(self) -> None:
        parameters = self.with_gradient()
        if not parameters:
            return
        updates = self.orthogonalize(parameters, lambda directions: self._update_momenta(parameters, directions))
        if self.found_inf is not None:
            torch._foreach_mul_(updates, (1 - self.found_inf).to(self.dtype))
        self._apply_updates(dict(zip(parameters, updates, strict=True)))

    def orthogonalize(
        self, parameters: list[Tensor], write_directions: Callable[[dict[int, Tensor]], None]
    ) -> list[Tensor]:
        """`newton_schulz` of the parameters' Nesterov directions; all ranks call this together.

        Args:
            write_directions: writes this rank's shards of the directions of some parameters, given by their index in
                the list, into the tensors that it gets.

        Returns:
            This rank's shards of the updates u of all parameters.
        """
        indices = tuple(k for k, p in enumerate(self._parameters()) if p.grad is not None)
        if indices not in self._sharded_maps:
            self._sharded_maps[indices] = newton_schulz_map(parameters)
        device = local(parameters[0]).device
        return self._sharded_maps[indices].apply(
            lambda batch: newton_schulz(batch, self.eps), write_directions, self.dtype, device
        )

    def with_gradient(self) -> list[Tensor]:
        return [p for p in self._parameters() if p.grad is not None]

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _update_momenta(self, parameters: list[Tensor], directions: dict[int, Tensor]) -> None:
        """Update all momenta, and write this rank's shards of the Nesterov directions lerp(g, m, momentum) that are
        asked for by the parameter's index."""
        gradients = [local(p.grad) for p in parameters if p.grad is not None]  # `step` keeps only these parameters
        momenta = [local(self.state[p]["momentum"]) for p in parameters]
        if self.found_inf is not None:
            # Multiplying by zero would keep a NaN. A lerp of the momentum towards itself changes no bit.
            skip = self.found_inf.bool()
            gradients = [torch.where(skip, m, g) for g, m in zip(gradients, momenta, strict=True)]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        if directions:
            ours = torch._foreach_lerp(
                [gradients[k] for k in directions], [momenta[k] for k in directions], self.momentum
            )
            torch._foreach_copy_(list(directions.values()), ours)

    def _apply_updates(self, updates: dict[Tensor, Tensor]) -> None:
        for group in self.param_groups:
            by_side = defaultdict(list)  # equal longer sides have equal scales
            for p in group["params"]:
                if p in updates:
                    by_side[max(p.shape)].append(p)
            for parameters in by_side.values():
                weights = [local(p) for p in parameters]
                rate = rate_of(parameters[0].shape, group["lr"])
                torch._foreach_add_(weights, [updates[p] for p in parameters], alpha=-rate)


def rate_of(shape: torch.Size, lr: float) -> float:
    """lr 0.2 sqrt(max(rows, columns)), the factor of a whole matrix's update."""
    return lr * 0.2 * max(shape) ** 0.5


def newton_schulz_map(parameters: list[Tensor]) -> ShardedMap:
    """`newton_schulz` over these parameters, balanced by FLOPs."""
    grid, matrices = layout(parameters)
    return ShardedMap(matrices, [newton_schulz_flops(matrix.shape) for matrix in matrices], grid)
