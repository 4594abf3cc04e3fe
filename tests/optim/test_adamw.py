import sys
import types

import pytest
import torch

from unite_fast.errors import UserError
from unite_fast.model.unite import UNITE
from unite_fast.optim.adamw import adamw
from unite_fast.training.train_state import TrainState


def test_adamw_of_torch_is_fused():
    optimizer = adamw("torch", [torch.nn.Parameter(torch.ones(2))], (0.9, 0.99), 1e-6)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"] and optimizer.defaults["weight_decay"] == 0


def test_missing_apex_is_an_error_with_a_remedy(monkeypatch, mentions):
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    with pytest.raises(UserError, match=mentions("optim.adamw", "apex", "optim.adamw=torch")):
        adamw("apex", [], (0.9, 0.999), 1e-6)


class FusedAdam(torch.optim.Optimizer):
    """Stands in for apex's FusedAdam, which needs a GPU: its arguments and state, with one step count per group."""

    def __init__(self, params, lr, betas, eps, adam_w_mode, weight_decay):
        assert adam_w_mode and weight_decay == 0
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), count = group["betas"], group["step"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(p.grad**2, 1 - beta2)
                scale = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt() + group["eps"]
                p.sub_(group["lr"] / (1 - beta1**count) * state["exp_avg"] / scale)


@pytest.fixture
def apex(monkeypatch):
    module = types.ModuleType("apex.optimizers")
    module.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)


def steps(state: TrainState, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in state.model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        state.apply_gradients()


def test_apex_matches_torch_and_resumes(apex, tiny_config):
    states = {}
    for name in ("torch", "apex"):
        tiny_config.optim.adamw = name
        states[name] = TrainState(UNITE.create(tiny_config.model, 0), tiny_config)
        steps(states[name], 0, 4)
    for ours, theirs in zip(*(state.model.parameters() for state in states.values()), strict=True):
        # Four steps of 1e-3: parameters that start at zero are about 4e-3.
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)

    resumed = TrainState(UNITE.create(tiny_config.model, 1), tiny_config)
    with torch.no_grad():
        for name, tensor in resumed.tensors().items():
            tensor.copy_(states["apex"].tensors()[name])
    resumed.resume_at(4)
    steps(states["apex"], 4, 6)
    steps(resumed, 4, 6)
    for one, other in zip(states["apex"].model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
