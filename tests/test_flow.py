"""The path and its loss, against formulas written out in float64."""

import math

import numpy as np
import pytest
import torch

from unite_fast import flow

FLOAT32_ROUNDING = 1e-6
"""A few roundings of 6e-8 each, relative."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_shifted_time():
    s = torch.linspace(0, 1, 11)
    want = [0.5 * x / (1 - 0.5 * x) for x in np.linspace(0, 1, 11)]
    assert flow.shift_time(s, 0.5).tolist() == pytest.approx(want, rel=FLOAT32_ROUNDING)


def test_shift_keeps_ends_and_order_and_is_undone_by_its_inverse():
    s = torch.linspace(0, 1, 101, dtype=torch.float64)
    t = flow.shift_time(s, 0.5)
    assert (t[0], t[-1]) == (0, 1)
    assert (t.diff() > 0).all()
    assert (t[1:-1] < s[1:-1]).all()  # more time near the noise
    torch.testing.assert_close(flow.shift_time(t, 2.0), s)
    torch.testing.assert_close(flow.shift_time(s, 1.0), s)


def test_the_path_runs_from_noise_to_data():
    z, noise = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    x = flow.interpolate(z, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(x[0], noise[0])
    assert torch.equal(x[1], z[1])
    torch.testing.assert_close(x[2], 0.25 * z[2] + 0.75 * noise[2])


@pytest.mark.parametrize(("t", "left"), [(0.0, 1.0), (0.9, 0.1), (0.95, 0.05), (0.99, 0.05), (1.0, 0.05)])
def test_time_left_has_a_floor(t, left):
    assert flow.time_left(torch.tensor(t)).item() == pytest.approx(left, rel=FLOAT32_ROUNDING)


def test_loss_is_a_mean_for_each_sample():
    z, prediction, t = normal(4, 5, 3), normal(4, 5, 3, seed=1), torch.tensor([0.0, 0.5, 0.94, 0.999])
    got = flow.flow_loss(z, prediction, t)
    for i in range(4):
        left = max(1 - t[i].item(), 0.05)
        errors = [
            ((a - b) / left) ** 2
            for a, b in zip(z[i].flatten().tolist(), prediction[i].flatten().tolist(), strict=True)
        ]
        assert got[i].item() == pytest.approx(math.fsum(errors) / 15, rel=FLOAT32_ROUNDING)


def test_loss_of_low_precision_predictions_is_float32():
    z, prediction, t = normal(2, 5, 3), normal(2, 5, 3, seed=1).bfloat16(), torch.tensor([0.1, 0.7])
    got = flow.flow_loss(z, prediction, t)
    assert got.dtype == torch.float32
    assert torch.equal(got, flow.flow_loss(z, prediction.float(), t))


def test_a_right_prediction_gives_the_paths_own_velocity():
    z, noise = normal(3, 2, 4).double(), normal(3, 2, 4, seed=1).double()
    t = torch.tensor(0.7, dtype=torch.float64)
    x = flow.interpolate(z, noise, t.expand(3))
    torch.testing.assert_close(flow.velocity(x, z, t), z - noise)


def test_near_the_end_velocity_is_bounded_by_the_floor():
    x, z = normal(1, 2, 4), normal(1, 2, 4, seed=1)
    torch.testing.assert_close(flow.velocity(x, z, torch.tensor(1.0)), (z - x) / 0.05)
