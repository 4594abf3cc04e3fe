"""The noise path against its formulas in float64."""

import math

import numpy as np
import pytest
import torch

from unite_fast import flow
from unite_fast.randomness import NoiseKeys, Philox, Stream

FLOAT32_ROUNDING = 1e-6
"""Relative error of a few roundings of 6e-8 each."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_shifted_time():
    s = torch.linspace(0, 1, 11)
    expected = [0.5 * x / (1 - 0.5 * x) for x in np.linspace(0, 1, 11)]
    assert flow.shift_time(s, 0.5).tolist() == pytest.approx(expected, rel=FLOAT32_ROUNDING)


def test_the_shift_keeps_ends_and_order_and_has_an_inverse():
    s = torch.linspace(0, 1, 101, dtype=torch.float64)
    t = flow.shift_time(s, 0.5)
    assert (t[0], t[-1]) == (0, 1)
    assert (t.diff() > 0).all()
    assert (t[1:-1] < s[1:-1]).all()  # more time near the noise
    torch.testing.assert_close(flow.shift_time(t, 2.0), s, rtol=1e-14, atol=0)
    torch.testing.assert_close(flow.shift_time(s, 1.0), s, rtol=1e-14, atol=0)


def test_the_path_runs_from_noise_to_data():
    z, noise = normal(3, 2, 4), normal(2, 3, 2, 4, seed=1)
    x = flow.interpolate(z, noise, torch.tensor([[0.0, 1.0, 0.25], [0.5, 0.0, 1.0]]))
    assert x.shape == (2, 3, 2, 4)
    for f, i in ((0, 0), (1, 1)):
        assert torch.equal(x[f, i], noise[f, i])
    for f, i in ((0, 1), (1, 2)):
        assert torch.equal(x[f, i], z[i])
    torch.testing.assert_close(x[0, 2], 0.25 * z[2] + 0.75 * noise[0, 2], rtol=0, atol=4 * FLOAT32_ROUNDING)


def test_keys_give_the_noise_of_their_draw():
    keys = NoiseKeys(Philox(3, 4, torch.arange(5, 8)), Stream.FLOW_NOISE)
    z, t, gate = normal(3, 2, 4), torch.rand(2, 3), torch.tensor([True, False, True])
    tensor = torch.stack([keys.philox.normal(Stream.FLOW_NOISE, (2, 4), draw) for draw in range(2)])
    for arguments in ((t,), (t, gate)):
        from_keys, from_tensor = flow.interpolate(z, keys, *arguments), flow.interpolate(z, tensor, *arguments)
        torch.testing.assert_close(from_keys, from_tensor, rtol=0, atol=4 * FLOAT32_ROUNDING)


def test_a_closed_gate_passes_no_noise():
    z, noise = normal(2, 3, 4), torch.full((1, 2, 3, 4), math.inf)
    x = flow.interpolate(z, noise, torch.full((1, 2), 0.5), torch.tensor([True, False]))
    assert x[0, 0].isinf().all() and torch.equal(x[0, 1], z[1])
