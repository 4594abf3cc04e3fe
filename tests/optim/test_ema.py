import pytest
import torch
from torch import nn

from unite_fast.optim.ema import EMA

FLOAT32_ROUNDING = 1e-6
"""Relative: ten updates with one rounding (6e-8) each."""


def norm_layer() -> nn.BatchNorm1d:
    """A layer with parameters and buffers."""
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(64)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def move(layer: nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += by * torch.randn(parameter.shape)


def test_averages_start_as_copies_of_the_parameters():
    layer = norm_layer()
    ema = EMA(layer, 0.9)
    start = layer.weight.detach().clone()
    assert torch.equal(ema.averages["weight"], start)
    move(layer, 1.0)
    assert torch.equal(ema.averages["weight"], start)


def test_updates_match_the_formula_in_float64():
    layer, decay = norm_layer(), 0.9978
    ema = EMA(layer, decay)
    expected = {name: p.detach().double() for name, p in layer.named_parameters()}
    for _ in range(10):
        move(layer, 1.0)
        ema.update()
        expected = {
            name: decay * expected[name] + (1 - decay) * p.detach().double() for name, p in layer.named_parameters()
        }
    for name, average in ema.averages.items():
        torch.testing.assert_close(average.double(), expected[name], rtol=FLOAT32_ROUNDING, atol=FLOAT32_ROUNDING)


def test_a_skipped_update_changes_no_bit_and_the_next_is_ordinary():
    layer = norm_layer()
    ema, usual = EMA(layer, 0.9978), EMA(layer, 0.9978)
    move(layer, 1.0)
    before = {name: average.clone() for name, average in ema.averages.items()}
    ema.update(torch.ones(()))
    assert all(torch.equal(average, before[name]) for name, average in ema.averages.items())
    ema.update(torch.zeros(()))
    usual.update()
    for name, average in ema.averages.items():
        torch.testing.assert_close(average, usual.averages[name], rtol=FLOAT32_ROUNDING, atol=FLOAT32_ROUNDING)


@pytest.mark.parametrize("fails", [False, True])
def test_applied_swaps_and_restores_even_on_failure(fails):
    layer = norm_layer()
    ema = EMA(layer, 0.5)
    move(layer, 1.0)
    ema.update()
    weights = {name: p.detach().clone() for name, p in layer.named_parameters()}
    averages = {name: average.clone() for name, average in ema.averages.items()}
    addresses = {name: p.data_ptr() for name, p in layer.named_parameters()}
    identities = {name: id(p) for name, p in layer.named_parameters()}
    try:
        with ema.applied():
            for name, parameter in layer.named_parameters():
                assert torch.equal(parameter, averages[name])
                assert id(parameter) == identities[name]  # optimizers and compiled code refer to this object
            assert not torch.equal(layer.weight, weights["weight"])
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert torch.equal(ema.averages[name], averages[name])
        assert parameter.data_ptr() == addresses[name]
        assert parameter.requires_grad


def test_a_compiled_model_uses_the_applied_averages():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    layer.compile(backend="eager")
    ema = EMA(layer, 0.5)
    x = torch.ones(1, 4)
    before = layer(x)
    with torch.no_grad():
        layer.weight += 1
    with ema.applied():
        assert torch.equal(layer(x), before)
    assert not torch.equal(layer(x), before)


def test_buffers_and_frozen_parameters_are_not_averaged():
    layer = norm_layer()
    layer.bias.requires_grad_(False)
    ema = EMA(layer, 0.5)
    assert list(ema.averages) == ["weight"]
    layer.running_mean.fill_(3.0)
    ema.update()
    with ema.applied():
        assert (layer.running_mean == 3.0).all()


def test_averages_of_low_precision_parameters_are_float32():
    ema = EMA(norm_layer().bfloat16(), 0.9978)
    assert {average.dtype for average in ema.averages.values()} == {torch.float32}
