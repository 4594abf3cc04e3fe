"""The training state: optimizer steps, and an exact round trip of all its tensors."""

import pytest
import torch

from unite_fast.model.unite import UNITE
from unite_fast.objective import draw_step
from unite_fast.optim.lr_schedule import learning_rate
from unite_fast.randomness import Philox
from unite_fast.training.train_state import TrainState
from unite_fast.training.train_step import MicroBatch, accumulate_gradients


def make_state(config) -> TrainState:
    return TrainState(UNITE.create(config.model, seed=0), config)


def train(state: TrainState, steps: int) -> list[float]:
    """Take steps on images seeded by the step number; returns total losses and gradient norms."""
    config, numbers = state.config, []
    for _ in range(steps):
        philox = Philox(0, state.step, torch.arange(config.train.batch_size))
        draws = draw_step(config.objective, philox, (config.model.latent_tokens, config.model.latent_channels))
        generator = torch.Generator().manual_seed(state.step)
        images = torch.rand(config.train.batch_size, 3, 8, 8, generator=generator)
        labels = torch.randint(config.model.num_classes, (config.train.batch_size,), generator=generator)
        losses = accumulate_gradients(state.model, [MicroBatch(images, labels, draws)], 1, config)
        numbers += [losses.total.item(), state.apply_gradients().item()]
    return numbers


def saved(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in state.tensors().items()}


@torch.no_grad()
def load(state: TrainState, tensors: dict[str, torch.Tensor], step: int) -> None:
    """Load in place, as from a checkpoint."""
    for name, tensor in state.tensors().items():
        tensor.copy_(tensors[name])
    state.resume_at(step)


@pytest.mark.parametrize("muon_dtype", ["bfloat16", "float32"])
def test_two_and_three_steps_equal_five_bit_for_bit(muon_dtype, tiny_config):
    tiny_config.optim.muon_dtype = muon_dtype
    whole = make_state(tiny_config)
    losses = train(whole, 5)

    before = make_state(tiny_config)
    assert train(before, 2) == losses[:4]
    after = TrainState(UNITE.create(tiny_config.model, seed=99), tiny_config)
    load(after, saved(before), before.step)
    assert train(after, 3) == losses[4:]
    assert after.step == 5
    expected, actual = whole.tensors(), after.tensors()
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def test_the_state_has_weights_averages_and_optimizer_tensors_of_every_parameter(tiny_config):
    state = make_state(tiny_config)
    train(state, 1)
    names = set(state.tensors())
    for name in state.muon_parameters:
        assert {f"model.{name}", f"ema.{name}", f"optim.{name}.momentum"} <= names
    for name in state.adamw_parameters:
        moments = {f"optim.{name}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
        assert {f"model.{name}", f"ema.{name}"} | moments <= names
    assert "model.encoder.time_embed.frequencies" in names  # drawn once, never trained: must be saved


def test_a_fresh_state_round_trips_before_its_first_step(tiny_config):
    fresh = make_state(tiny_config)
    other = TrainState(UNITE.create(tiny_config.model, seed=99), tiny_config)
    load(other, saved(fresh), 0)
    assert train(other, 2) == train(fresh, 2)


def test_one_step_by_hand(tiny_config):
    """Clipping by the global norm, the scheduled rate in both optimizers, averages, cleared gradients."""
    tiny_config.optim.clip_norm = 0.5
    state = make_state(tiny_config)
    state.step = 1  # the rate of step 0 is zero
    start = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for parameter in state.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    gradients = {name: p.grad.clone() for name, p in state.model.named_parameters()}
    norm = torch.cat([g.flatten() for g in gradients.values()]).double().norm().item()

    assert state.apply_gradients().item() == pytest.approx(norm, rel=1e-6)
    assert state.step == 2
    rate = learning_rate(tiny_config.schedule, 6, 1)
    assert rate == state.last_learning_rate == 5e-4
    assert state.learning_rate == 1e-3
    assert all(p.grad is None for p in state.model.parameters())

    # AdamW's first step is the rate times g / (|g| + eps), with the clipped gradient.
    name = "decoder.cls_token"
    g = gradients[name].double() * 0.5 / norm
    expected = start[name].double() - rate * g / (g.abs() + tiny_config.optim.eps)
    torch.testing.assert_close(state.model.get_parameter(name).double(), expected, rtol=1e-4, atol=1e-8)
    # Muon's update has AdamW's scale, independent of the gradient's.
    for name in state.muon_parameters:
        moved = state.model.get_parameter(name) - start[name]
        assert 0.03 * rate < moved.square().mean().sqrt() < 0.3 * rate, name
    for name, parameter in state.model.named_parameters():
        expected = torch.lerp(start[name], parameter.detach(), 1 - tiny_config.optim.ema_decay)
        torch.testing.assert_close(state.ema.averages[name], expected)


@pytest.mark.parametrize("clip_norm", [0.5, 1e9])
def test_clipping_equals_torchs_bit_for_bit(clip_norm, tiny_config):
    tiny_config.optim.clip_norm = clip_norm
    state, twin = make_state(tiny_config), make_state(tiny_config).model
    generator = torch.Generator().manual_seed(0)
    for ours, theirs in zip(state.parameters, twin.parameters(), strict=True):
        ours.grad = torch.randn(ours.shape, generator=generator)
        theirs.grad = ours.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), clip_norm, foreach=True)
    norm = state.gradient_norm()
    state.clip_gradients(norm)
    assert torch.equal(norm, expected)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(state.parameters, twin.parameters(), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_skipped_step_changes_nothing(value, tiny_config):
    tiny_config.optim.nonfinite = "skip"
    state, undisturbed = make_state(tiny_config), make_state(tiny_config)
    train(state, 2)
    before = saved(state)
    for parameter in state.parameters:
        parameter.grad = torch.full_like(parameter, value)
    assert not state.apply_gradients().isfinite()
    assert [name for name, x in state.tensors().items() if not torch.equal(x, before[name])] == []
    assert (int(state.skipped_steps), state.step) == (1, 3)
    # The next step is as if none had been skipped: AdamW did not count it.
    train(undisturbed, 2)
    undisturbed.step = 3
    assert train(state, 1) == train(undisturbed, 1)
    assert int(state.skipped_steps) == 1


def test_optimizer_tensors_exist_before_the_first_step(tiny_config):
    state = make_state(tiny_config)
    fresh = saved(state)
    assert not any(x.any() for name, x in fresh.items() if name.startswith("optim."))
    addresses = {name: x.data_ptr() for name, x in state.tensors().items()}
    train(state, 1)
    assert {name: x.data_ptr() for name, x in state.tensors().items()} == addresses


def test_small_gradients_are_not_clipped(tiny_config):
    state = make_state(tiny_config)
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-6)
    state.apply_gradients()
    momentum = state.muon.state[state.muon_parameters["decoder.pred.weight"]]["momentum"]
    torch.testing.assert_close(momentum, torch.full_like(momentum, 0.05 * 1e-6))


def test_training_lowers_the_loss(tiny_config):
    """Forty steps on one batch with one set of draws."""
    state = make_state(tiny_config)
    draws = draw_step(tiny_config.objective, Philox(0, 0, torch.arange(6)), (4, 6))
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 5
    totals = []
    tiny_config.schedule.decay_until = 0
    for _ in range(40):
        losses = accumulate_gradients(state.model, [MicroBatch(images, labels, draws)], 1, tiny_config)
        state.apply_gradients()
        totals.append(losses.l1.item())
    assert totals[-1] < 0.7 * totals[0]
