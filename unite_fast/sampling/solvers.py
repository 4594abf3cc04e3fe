"""Solvers of the sampling ODE, from noise at t = 0 to latents at t = 1: dx/dt = (x_hat(t, x) - x) / m(t), where
m(t) = max(1 - t, MIN_TIME_LEFT).

x_hat is the network's prediction of the clean latents. Times are Python numbers, so a fixed-step solver never
synchronises with the GPU; dopri5, which chooses its own steps, does.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from unite_fast.flow import MIN_TIME_LEFT

DOPRI5_RTOL, DOPRI5_ATOL = 1e-3, 1e-6
"""Tolerances of the released code."""

FLOOR_TIME = 1 - MIN_TIME_LEFT
"""From this time on, m(t) is MIN_TIME_LEFT."""

Prediction = Callable[[float, Tensor], Tensor]
"""(t, x [B, N, C]) -> x_hat [B, N, C]."""


def velocity(predict: Prediction, t: float, x: Tensor) -> Tensor:
    """dx/dt [B, N, C]."""
    return (predict(t, x) - x) / max(1 - t, MIN_TIME_LEFT)


def euler(predict: Prediction, x: Tensor, times: list[float]) -> Tensor:
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(predict, t, x)
    return x


def heun(predict: Prediction, x: Tensor, times: list[float]) -> Tensor:
    """The explicit trapezoid rule: second order, two predictions per step."""
    for t, t_next in pairwise(times):
        step = t_next - t
        slope = velocity(predict, t, x)
        x = x + step / 2 * (slope + velocity(predict, t_next, x + step * slope))
    return x


def multistep(predict: Prediction, x: Tensor, times: list[float]) -> Tensor:
    """Second order with one prediction per step, for a network that predicts the clean data. A step follows the line
    through the last two predictions (DPM-Solver++(2M), Lu et al., arXiv 2211.01095); the next prediction then corrects
    it without another pass (UniPC, Zhao et al., arXiv 2302.04867). Derived here for our path.

    The equation is linear except for x_hat. With N(t) the remaining noise, N' = -N / m(t) and N(0) = 1, variation of
    constants solves it exactly:

        x(t1) = N1/N0 x(t0) + integral, for t from t0 to t1, of x_hat(t) d(N1/N(t)),

    a weighted mean of x and the predictions in between, since N1/N(t) rises from N1/N0 to 1. Only x_hat is
    approximated, by a straight line in t; `step_on_line` has its integral. The predictor takes the line through the
    last two predictions; the first step has only one and keeps it constant, which on this path is Euler's step. Once
    the prediction at t1 is known, the corrector repeats the step from t0 with the line through both ends. Both have a
    local error of O(step^3), smaller for the corrector. The last step to t = 1, which `multistep_times` makes short, is
    not corrected. Where the times end before t = 1, because guidance jumps, one more prediction corrects the last step.

    DPM-Solver++ takes x_hat linear in half the log signal-to-noise ratio, lambda = log(t / (1 - t)) = log t - log N.
    With lambda, 8 steps on the digits and on Fashion-MNIST ended two to three times as far from the exact solution as
    with t: near the end, where lambda changes fastest, the predictions hardly change. A parabola through three
    predictions was slightly closer with 18 steps, but two to eight times as far off with 8 steps or at guidance 8
    (docs/LOG.md).

    The floor of m is not approximated: N continues past it exactly, so the end point solves the same equation that the
    other solvers integrate. N(1) = 0.05 / e, so 1.8 % of the noise remains in it.
    """
    prediction, slope = predict(times[0], x), torch.zeros_like(x)
    for t, t_next in pairwise(times):
        predicted = step_on_line(x, prediction, slope, t, t_next)
        if t_next == 1:
            return predicted
        next_prediction = predict(t_next, predicted)
        slope = (next_prediction - prediction) / (t_next - t)
        x, prediction = step_on_line(x, prediction, slope, t, t_next), next_prediction
    return x


def multistep_times(steps: int, start: float = 0.0, end: float = 1.0) -> list[float]:
    """Step times of multistep from `start` to `end`. `steps` counts the steps from 0 to 1; this part gets a
    proportional share of them, at least one.

    Spaced evenly in log((t + m) / (1 - t + m)), m = MIN_TIME_LEFT, which is lambda (see `multistep`) kept finite at
    both ends by the floor. The error of a step grows with its length cubed, with the curvature of x_hat(t), largest
    near the noise, and with 1 / m(t), largest near the data; so steps should be short at both ends. With 20 such steps,
    half of the digits are within 0.0012 of the pixels of the exact solution, and half of Fashion-MNIST within 0.0014;
    with the spacing of `time_shift`, within 0.0032 and 0.0020 (docs/LOG.md).
    """
    first, total = smoothed_log_odds(start), 2 * smoothed_log_odds(1)
    length = smoothed_log_odds(end) - first
    count = max(1, round(steps * length / total))
    inner = ((0.5 + MIN_TIME_LEFT) * math.tanh((first + length * i / count) / 2) + 0.5 for i in range(1, count))
    return [start, *inner, end]


def smoothed_log_odds(t: float) -> float:
    """log((t + m) / (1 - t + m)), antisymmetric about t = 1/2. The inverse of v is 1/2 + (1/2 + m) tanh(v / 2)."""
    return math.log((t + MIN_TIME_LEFT) / (1 - t + MIN_TIME_LEFT))


def step_on_line(x: Tensor, prediction: Tensor, slope: Tensor, t0: float, t1: float) -> Tensor:
    """Exact x(t1) from x(t0) if x_hat(t) = prediction + (t - t0) slope.

    Integrated by parts: the integral of (t - t0) d(N1/N) is t1 - t0 - N1 (G(t1) - G(t0)), where G' = 1 / N.
    """
    (n0, g0), (n1, g1) = remaining_noise(t0), remaining_noise(t1)
    return n1 / n0 * x + (1 - n1 / n0) * prediction + (t1 - t0 - n1 * (g1 - g0)) * slope


def remaining_noise(t: float) -> tuple[float, float]:
    """N(t) = exp(-integral of 1/m from 0 to t) and G(t), the integral of 1/N. N = 1 - t up to the floor, then decays
    exponentially."""
    if t < FLOOR_TIME:
        return 1 - t, -math.log1p(-t)
    grown = math.exp((t - FLOOR_TIME) / MIN_TIME_LEFT)
    return MIN_TIME_LEFT / grown, -math.log(MIN_TIME_LEFT) + grown - 1


def dopri5(predict: Prediction, x: Tensor, times: list[float]) -> Tensor:
    """Adaptive Runge-Kutta 5(4) of torchdiffeq, from the first to the last time; the times between are ignored. Step
    sizes depend on the whole batch. Where guidance jumps, errors can exceed the tolerances (docs/LOG.md). NaN if there
    is no solution."""
    from torchdiffeq import odeint  # imports scipy, which no other solver needs

    ends = torch.tensor([times[0], times[-1]], device=x.device, dtype=x.dtype)
    try:
        path = odeint(
            lambda t, x: velocity(predict, float(t), x), x, ends, rtol=DOPRI5_RTOL, atol=DOPRI5_ATOL, method="dopri5"
        )
    except AssertionError:  # no step is small enough: a prediction is not finite, or the guidance is huge
        return torch.full_like(x, math.nan)
    assert isinstance(path, Tensor)  # a tuple only for a tuple x
    return path[-1]


RELEASED_SOLVERS = {"euler": euler, "heun": heun, "dopri5": dopri5}
"""Solvers of the released code. They do not split their steps where guidance jumps."""
ADAPTIVE_SOLVERS = ("dopri5",)
"""Solvers that choose their own steps and ignore `sampling.steps`."""
TIME_GRID_SOLVERS = ("euler", "heun")
"""Solvers whose steps `sampling.time_shift` spaces."""
