"""The draws of a step: shapes, distributions, independence of the micro-batch."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from unite_fast.config import ObjectiveConfig
from unite_fast.objective import StepDraws, draw_step
from unite_fast.randomness import Philox

SIGMAS = 5
"""Bound on an estimate from a fixed seed. A fault exceeds it by far; chance would once in 1.7 million."""

BATCH = 6


def test_draws_do_not_depend_on_the_micro_batch(tiny_config, draws, draws_at, with_numbers):
    parts = [with_numbers(draws_at(tiny_config, part), (4, 6)) for part in torch.arange(BATCH).split([1, 3, 2])]
    draws = with_numbers(draws, (4, 6))
    for field in dataclasses.fields(StepDraws):
        whole = getattr(draws, field.name)
        axis = 1 if field.name in ("flow_time", "flow_noise", "label_drop") else 0
        assert torch.equal(torch.cat([getattr(part, field.name) for part in parts], axis), whole), field.name


def test_shapes_of_the_draws(draws, with_numbers):
    n, c, f = 4, 6, 3
    draws = with_numbers(draws, (n, c))
    shapes = {field.name: tuple(getattr(draws, field.name).shape) for field in dataclasses.fields(StepDraws)}
    assert shapes == {
        "registers": (BATCH, n, c),
        "recon_time": (BATCH,),
        "decoder_noise_mask": (BATCH,),
        "decoder_noise_time": (BATCH,),
        "decoder_noise": (BATCH, n, c),
        "flow_time": (f, BATCH),
        "flow_noise": (f, BATCH, n, c),
        "label_drop": (f, BATCH),
    }


def test_distributions_of_the_draws(with_numbers):
    count = 20_000
    draws = with_numbers(draw_step(ObjectiveConfig(), Philox(1, 2, torch.arange(count)), (1, 4)), (1, 4))

    def assert_mean(values: Tensor, mean: float, deviation: float) -> None:
        assert abs(values.double().mean().item() - mean) < SIGMAS * deviation / math.sqrt(values.numel())

    for normal in (draws.registers, draws.decoder_noise, *draws.flow_noise):
        assert_mean(normal, 0, 1)
        assert_mean(normal.square(), 1, math.sqrt(2))
    for uniform, low, high in ((draws.recon_time, 0, 0.01), (draws.decoder_noise_time, 0.7, 1)):
        assert low <= uniform.min() and uniform.max() <= high
        width = high - low
        assert_mean((uniform - low) / width, 1 / 2, math.sqrt(1 / 12))
        assert_mean(((uniform - low) / width).square(), 1 / 3, math.sqrt(4 / 45))
    assert_mean(draws.decoder_noise_mask, 0.5, 0.5)
    for f in range(3):
        assert_mean(draws.label_drop[f], 0.1, 0.3)
        t = draws.flow_time[f].double()
        s = 2 * t / (1 + t)  # the inverse of t = 0.5 s / (1 - 0.5 s)
        assert_mean(s.logit(), 0, 1)
        assert_mean(s.logit().square(), 1, math.sqrt(2))


def test_draws_are_uncorrelated(with_numbers):
    draws = with_numbers(draw_step(ObjectiveConfig(), Philox(1, 2, torch.arange(1000)), (1, 1)), (1, 1))
    columns = [draws.registers, draws.decoder_noise, *draws.flow_noise, draws.recon_time, draws.decoder_noise_time]
    columns += [*draws.flow_time, draws.decoder_noise_mask, *draws.label_drop]
    table = torch.stack([column.flatten().double() for column in columns])
    correlation = torch.corrcoef(table) - torch.eye(len(table))
    assert correlation.abs().max() < SIGMAS / math.sqrt(1000)


def test_mean_and_deviation_of_the_times_are_settings():
    config = ObjectiveConfig(time_mean=-0.8, time_std=0.5, time_shift=1.0, flow_draws=1)
    u = draw_step(config, Philox(1, 2, torch.arange(20_000)), (1, 1)).flow_time.double().logit()
    assert u.mean().item() == pytest.approx(-0.8, abs=SIGMAS * 0.5 / math.sqrt(20_000))
    assert u.std().item() == pytest.approx(0.5, rel=SIGMAS / math.sqrt(40_000))


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0), (1.0, BATCH)])
def test_probability_0_is_never_and_1_is_always(probability, share):
    config = ObjectiveConfig(decoder_noise_probability=probability, label_drop=probability)
    draws = draw_step(config, Philox(1, 2, torch.arange(BATCH)), (1, 1))
    assert draws.decoder_noise_mask.sum() == share
    assert draws.label_drop.sum() == 3 * share
