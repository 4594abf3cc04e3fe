"""One step of Muon, AdamW and the averages on a GPU: a few launches, each over all tensors (kernels/triton_kernels/
optimizer.py), and clipped gradients are never written. Elsewhere TrainState calls `Muon.step`, `AdamW.step` and
`EMA.update`, which compute the same."""

from collections.abc import Iterable

import torch
from torch import Tensor

from unite_fast.distributed.dtensor import local
from unite_fast.kernels import backend
from unite_fast.kernels.fused_op import triton_function
from unite_fast.optim.ema import EMA
from unite_fast.optim.muon import Muon, rate_of

_gradient_norm = triton_function("optimizer", "gradient_norm")
_muon_momentum = triton_function("optimizer", "muon_momentum")
_muon_update = triton_function("optimizer", "muon_update")
_adamw_update = triton_function("optimizer", "adamw_update")


class FusedStep:
    """
    Args:
        clip_norm: gradients are scaled to a norm of at most this.
    """

    def __init__(self, muon: Muon, adamw: torch.optim.Optimizer, ema: EMA, clip_norm: float):
        self.muon, self.adamw, self.ema, self.clip_norm = muon, adamw, ema, clip_norm
        self.averages: dict[Tensor, Tensor] = {p: ema.averages[name] for name, p in ema.parameters.items()}
        shards = [local(p) for p in ema.parameters.values()]
        self._device = shards[0].device
        self._readable = all(p.dtype == torch.float32 and p.is_contiguous() for p in shards)

    @property
    def available(self) -> bool:
        """Whether Triton runs on the parameters' device, and all are contiguous and float32."""
        return self._readable and backend.backend_on(self._device) == "triton"

    def gradient_norm(self) -> Tensor:
        """Norm of this rank's gradients; float32 scalar on their device."""
        (norm,) = _gradient_norm(_gradients(self.averages))
        return norm

    @torch.no_grad()
    def __call__(self, norm: Tensor, found_inf: Tensor | None) -> None:
        """
        Args:
            norm: of all gradients; float32 scalar on their device.
            found_inf: None, or a float32 scalar on that device; if it is 1, no parameter, state or average changes.
        """
        moved = self._step_muon(norm, found_inf) | self._step_adamw(norm, found_inf)
        self.ema.update(found_inf, except_for=moved)

    def _step_muon(self, norm: Tensor, found_inf: Tensor | None) -> set[Tensor]:
        muon, parameters = self.muon, self.muon.with_gradient()
        if not parameters:
            return set()
        momenta = [local(muon.state[p]["momentum"]) for p in parameters]

        def write_directions(directions: dict[int, Tensor]) -> None:
            wanted = [directions.get(k) for k in range(len(parameters))]
            _muon_momentum(_gradients(parameters), momenta, wanted, norm, self.clip_norm, muon.momentum, found_inf)

        updates = muon.orthogonalize(parameters, write_directions)
        lr = muon.param_groups[0]["lr"]
        rates = [rate_of(p.shape, lr) for p in parameters]
        _muon_update(*self._weights_and_averages(parameters), updates, rates, self.ema.decay, found_inf)
        return set(parameters)

    def _step_adamw(self, norm: Tensor, found_inf: Tensor | None) -> set[Tensor]:
        group, state = self.adamw.param_groups[0], self.adamw.state
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return set()
        if not isinstance(self.adamw, torch.optim.AdamW):  # apex's reads its gradients as they are
            torch._foreach_mul_(_gradients(parameters), (self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
            self.adamw.step()
            return set()
        moments = [[local(state[p][key]) for p in parameters] for key in ("exp_avg", "exp_avg_sq")]
        _adamw_update(
            _gradients(parameters),
            *self._weights_and_averages(parameters),
            moments,
            [state[p]["step"] for p in parameters],
            norm,
            self.clip_norm,
            group["lr"],
            group["betas"],
            group["eps"],
            self.ema.decay,
            found_inf,
        )
        return set(parameters)

    def _weights_and_averages(self, parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [local(p.detach()) for p in parameters], [local(self.averages[p]) for p in parameters]


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [local(p.grad).contiguous() for p in parameters if p.grad is not None]
