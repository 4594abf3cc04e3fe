"""Solvers on equations with known solutions."""

import math
from itertools import pairwise

import pytest
import torch

from unite_fast import flow
from unite_fast.flow import MIN_TIME_LEFT
from unite_fast.sampling import solvers
from unite_fast.sampling.solvers import (
    dopri5,
    euler,
    heun,
    multistep,
    multistep_times,
    remaining_noise,
    step_on_line,
    velocity,
)


def predict(t, x):
    """The prediction for dx/dt = t (1 - 2 x), whose solution is x = 1/2 + (x0 - 1/2) exp(-t^2)."""
    return x + max(1 - t, MIN_TIME_LEFT) * t * (1 - 2 * x)


def test_the_exact_prediction_gives_the_velocity_of_the_path():
    z, noise = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor(0.7, dtype=torch.float64)
    x = flow.interpolate(z, noise[None], t.expand(1, 3))[0]
    torch.testing.assert_close(velocity(lambda t, x: z, 0.7, x), z - noise, rtol=0, atol=1e-14)


def test_near_the_end_velocity_is_bounded_by_the_floor():
    x, z = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(velocity(lambda t, x: z, 1.0, x), (z - x) / 0.05, rtol=1e-6, atol=0)


def grid(steps: int, end: float = 1.0) -> list[float]:
    """Steps of unequal length."""
    return (end * flow.shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), 0.5)).tolist()


def error_of(solver, times: list[float]) -> float:
    x = torch.tensor([[2.0]], dtype=torch.float64)
    return abs(solver(predict, x, times).item() - (0.5 + 1.5 * math.exp(-(times[-1] ** 2))))


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2), (multistep, 2)])
def test_order_of_the_fixed_step_solvers(solver, order):
    """Up to the start of the floor, where the prediction of this equation has a kink."""
    measured = math.log2(error_of(solver, grid(128, 0.9)) / error_of(solver, grid(256, 0.9)))
    assert measured == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2), (multistep, 2)])
def test_the_floor_costs_no_order(solver, order):
    """A prediction without a kink, through the floor to the end; the reference is heun with four times the steps."""

    def solved(solver, steps):
        return solver(lambda t, x: math.cos(3 * t) + 0.5 * x, torch.tensor([2.0], dtype=torch.float64), grid(steps))

    reference = solved(heun, 2000)
    errors = [abs(solved(solver, steps) - reference).item() for steps in (100, 500)]
    assert math.log(errors[0] / errors[1]) / math.log(5) > order - 0.1


@pytest.mark.parametrize(("solver", "predictions"), [(euler, 5), (heun, 10), (multistep, 5)])
def test_predictions_of_five_steps(solver, predictions):
    times = []

    def counted(t, x):
        times.append(t)
        return predict(t, x)

    solver(counted, torch.ones(1, 1), grid(5))
    assert len(times) == predictions
    assert times[-1] == (1.0 if solver is heun else grid(5)[-2])
    assert all(type(t) is float for t in times), "a tensor would synchronise a GPU at each step"


def test_dopri5_keeps_its_tolerance_and_ignores_the_grid():
    assert error_of(dopri5, grid(2)) < 2 * solvers.DOPRI5_RTOL
    assert error_of(dopri5, grid(2)) == error_of(dopri5, grid(50))


def test_dopri5_needs_few_evaluations_for_a_smooth_equation():
    calls = []

    def counted(t, x):
        calls.append(t)
        return predict(t, x)

    dopri5(counted, torch.ones(1, 1), grid(50))
    assert len(calls) < 100


@pytest.mark.parametrize("times", [[0.0, 1.0], [0.0, 0.3, 0.96, 1.0], [0.1, 0.95, 0.97], [0.0, 0.2, 0.5]])
def test_multistep_is_exact_for_a_constant_prediction(times):
    """dx/dt = (z - x) / m(t): x - z shrinks as 1 - t, and in the floor by the factor e every MIN_TIME_LEFT."""
    x, z = torch.tensor([3.0], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)

    def left(t):
        return 1 - t if t < 0.95 else 0.05 * math.exp(-(t - 0.95) / 0.05)

    expected = z + left(times[-1]) / left(times[0]) * (x - z)
    torch.testing.assert_close(multistep(lambda t, x: z, x, times), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 0.6), (0.2, 0.97), (0.95, 1.0), (0.96, 1.0)])
def test_a_linear_prediction_is_integrated_exactly(t0, t1):
    """Compared with two thousand steps of heun."""
    x, prediction, slope = torch.tensor([[3.0], [-2.0], [0.7]], dtype=torch.float64)
    times = torch.linspace(t0, t1, 2001, dtype=torch.float64).tolist()
    expected = heun(lambda t, x: prediction + (t - t0) * slope, x, times)
    torch.testing.assert_close(step_on_line(x, prediction, slope, t0, t1), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("end", [0.8, 1.0])
def test_multistep_corrects_a_step_with_the_next_prediction(end):
    """Two steps: the first is repeated with the line through the predictions at both its ends. The second extrapolates
    that line, and is repeated as well unless it ends at 1."""
    predictions = {0.0: torch.tensor(1.0), 0.5: torch.tensor(2.0), 0.8: torch.tensor(5.0)}
    calls = []

    def predict(t, x):
        calls.append((t, x.item()))
        return predictions[t]

    actual = multistep(predict, torch.tensor(0.0), [0.0, 0.5, end])
    middle = step_on_line(torch.tensor(0.0), predictions[0.0], torch.tensor(2.0), 0.0, 0.5)
    ahead = step_on_line(middle, predictions[0.5], torch.tensor(2.0), 0.5, end).item()
    corrected = step_on_line(middle, predictions[0.5], torch.tensor(10.0), 0.5, end).item()
    assert calls[:2] == [(0.0, 0.0), (0.5, 0.5)]
    assert calls[2:] == ([] if end == 1 else [(0.8, pytest.approx(ahead))])
    assert actual.item() == pytest.approx(ahead if end == 1 else corrected)


def test_steps_of_multistep_are_even_in_log_odds():
    times = multistep_times(20)
    log_odds = [math.log((t + 0.05) / (1 - t + 0.05)) for t in times]
    assert (times[0], times[-1], len(times)) == (0.0, 1.0, 21)
    assert [b - a for a, b in pairwise(log_odds)] == pytest.approx([math.log(21) / 10] * 20)


@pytest.mark.parametrize(("start", "end", "parts"), [(0.0, 0.5, 10), (0.1, 1.0, 16), (0.5, 0.5001, 1), (0.0, 0.1, 4)])
def test_a_segment_has_its_share_of_the_steps(start, end, parts):
    times = multistep_times(20, start, end)
    assert (times[0], times[-1], len(times) - 1) == (start, end, parts)
    assert all(a < b for a, b in pairwise(times))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.94, 0.97, 1.0])
def test_remaining_noise_falls_with_the_remaining_time(t):
    h = 1e-6
    (n0, g0), (n, _), (n1, g1) = (remaining_noise(t + d) for d in (-h, 0.0, h))
    assert remaining_noise(0.0) == (1, 0)
    assert (n1 - n0) / (2 * h) / n == pytest.approx(-1 / max(1 - t, MIN_TIME_LEFT), rel=1e-5)
    assert (g1 - g0) / (2 * h) == pytest.approx(1 / n, rel=1e-5)


@pytest.mark.parametrize("factor", [math.nan, -1e30])
def test_dopri5_without_a_solution_gives_nan(factor):
    x = torch.ones(2, 3, 4)
    assert dopri5(lambda t, x: factor * x, x, [0.0, 1.0]).isnan().all()
