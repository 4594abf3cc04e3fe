"""Solvers on equations with known solutions."""

import math

import pytest
import torch

from unite_fast import flow, solvers
from unite_fast.flow import MIN_TIME_LEFT
from unite_fast.solvers import dopri5, euler, heun, multistep, noise_left


def predict(t, x):
    """What makes dx/dt = t (1 - 2 x), solved by x = 1/2 + (x0 - 1/2) exp(-t^2)."""
    return x + max(1 - t, MIN_TIME_LEFT) * t * (1 - 2 * x)


def grid(steps: int) -> list[float]:
    """Steps of unequal length."""
    return flow.shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), 0.5).tolist()


def error_of(solver, steps: int) -> float:
    x = torch.tensor([[2.0]], dtype=torch.float64)
    return abs(solver(predict, x, grid(steps)).item() - (0.5 + 1.5 * math.exp(-1)))


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2), (multistep, 2)])
def test_order_of_the_fixed_step_solvers(solver, order):
    # Over four doublings: where the floor's kink falls in a step makes the error of multistep waver by a quarter.
    measured = math.log2(error_of(solver, 128) / error_of(solver, 2048)) / 4
    assert measured == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("solver", "passes"), [(euler, 1), (heun, 2), (multistep, 1)])
def test_predictions_a_step(solver, passes):
    times = []

    def counted(t, x):
        times.append(t)
        return predict(t, x)

    solver(counted, torch.ones(1, 1), grid(5))
    assert len(times) == 5 * passes
    assert all(type(t) is float for t in times), "a tensor would make a GPU wait at each step"


def test_dopri5_keeps_its_tolerance_and_does_not_heed_the_grid():
    assert error_of(dopri5, 2) < 2 * solvers.DOPRI5_RTOL
    assert error_of(dopri5, 2) == error_of(dopri5, 50)


def test_dopri5_spends_few_evaluations_on_a_smooth_equation():
    calls = []

    def counted(t, x):
        calls.append(t)
        return predict(t, x)

    dopri5(counted, torch.ones(1, 1), grid(50))
    assert len(calls) < 100


@pytest.mark.parametrize("times", [[0.0, 1.0], [0.0, 0.3, 0.96, 1.0], [0.1, 0.95, 0.97], [0.0, 0.2, 0.5]])
def test_multistep_is_exact_for_a_prediction_that_stays(times):
    """dx/dt = (z - x) / m(t): what is left of x - z shrinks as 1 - t, and past the floor by e every MIN_TIME_LEFT."""
    x, z = torch.tensor([3.0], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)

    def left(t):
        return 1 - t if t < 0.95 else 0.05 * math.exp(-(t - 0.95) / 0.05)

    want = z + left(times[-1]) / left(times[0]) * (x - z)
    torch.testing.assert_close(multistep(lambda t, x: z, x, times), want, rtol=1e-12, atol=0)


def test_multistep_takes_the_middle_of_a_prediction_that_moves():
    """Two steps by hand, the second with the line through both predictions."""
    predictions = {0.0: 1.0, 0.5: 2.0}
    got = multistep(lambda t, x: torch.tensor(predictions[t]), torch.tensor(0.0), [0.0, 0.5, 0.8])
    after_one = 0.5 * 1.0
    assert got.item() == pytest.approx(0.4 * after_one + 0.6 * (2.0 + 0.3 / 0.5 / 2 * (2.0 - 1.0)))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.94, 0.95, 0.97, 1.0])
def test_noise_left_falls_by_its_share_of_the_time_left(t):
    assert noise_left(0.0) == 1
    h = 1e-7
    slope = (noise_left(t + h) - noise_left(t - h)) / (2 * h)
    assert slope / noise_left(t) == pytest.approx(-1 / max(1 - t, MIN_TIME_LEFT), rel=1e-5)
