"""From noise at t = 0 to latents at t = 1: dx/dt = (x_hat(t, x) - x) / m(t), where m(t) = max(1 - t, MIN_TIME_LEFT).

x_hat is the network's prediction of the clean latents. Every solver takes the times as Python numbers, so that none of
them makes a GPU wait for the host; only dopri5, which chooses its own, has to.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from unite_fast.flow import MIN_TIME_LEFT

DOPRI5_RTOL, DOPRI5_ATOL = 1e-3, 1e-6
"""The released code's tolerances."""

FLOOR_FROM = 1 - MIN_TIME_LEFT
"""The time from which m(t) is MIN_TIME_LEFT."""

Prediction = Callable[[float, Tensor], Tensor]
"""(t, x [B, N, C]) -> x_hat [B, N, C]."""


def velocity(predict: Prediction, t: float, x: Tensor) -> Tensor:
    """dx/dt [B, N, C]."""
    return (predict(t, x) - x) / max(1 - t, MIN_TIME_LEFT)


def euler(predict: Prediction, x: Tensor, times: list[float]) -> Tensor:
    for t, following in pairwise(times):
        x = x + (following - t) * velocity(predict, t, x)
    return x


def heun(predict: Prediction, x: Tensor, times: list[float]) -> Tensor:
    """The explicit trapezoid rule, second order, two predictions a step."""
    for t, following in pairwise(times):
        step = following - t
        slope = velocity(predict, t, x)
        x = x + step / 2 * (slope + velocity(predict, following, x + step * slope))
    return x


def multistep(predict: Prediction, x: Tensor, times: list[float]) -> Tensor:
    """Second order at one prediction a step, for a network that predicts the clean data: a step along the line through
    the last two predictions (DPM-Solver++(2M), Lu et al., arXiv 2211.01095), which the next prediction then corrects
    without another pass (UniPC, Zhao et al., arXiv 2302.04867); derived here for our path.

    But for x_hat the equation is linear. With N(t) the noise that is left, N' = -N / m(t) and N(0) = 1, variation of
    constants solves it exactly:

        x(t1) = N1/N0 x(t0) + integral, for t from t0 to t1, of x_hat(t) d(N1/N(t)),

    a weighted mean of x and of the predictions on the way, since N1/N(t) rises from N1/N0 to 1. Only x_hat is
    approximated, by a straight line in t, for which `follow_line` has the integral. Leaving t0, the line goes through
    the last two predictions; the first step has but one and holds it, which on this path is Euler's step. Once the
    prediction at t1 is there, the step from t0 is done again with the line through both its ends. Both err by
    O(step^3) a step, the second less. The path's last step, a short one by `multistep_times`, stays uncorrected; where
    the times end before t = 1, as they do where guidance jumps, one more prediction corrects it.

    DPM-Solver++ lets x_hat be linear in half the log signal-to-noise ratio, lambda = log(t / (1 - t)) = log t - log N.
    In lambda, 8 steps of the digits and of Fashion-MNIST ended two to three times as far from the exact solution as in
    t: the predictions hardly change any more towards the end, where lambda runs fastest. A parabola through three
    predictions was a little nearer the exact solution with 18 steps, and two to eight times as far off with 8 steps or
    at guidance 8 (docs/LOG.md).

    The floor of m is no approximation here: N goes on past it exactly, so the end point is that of the equation which
    the other solvers integrate. It is not quite a prediction: N(1) = 0.05 / e = 1.8 % of the noise is left in it.
    """
    prediction, slope = predict(times[0], x), torch.zeros_like(x)
    for t, following in pairwise(times):
        ahead = follow_line(x, prediction, slope, t, following)
        if following == 1:
            return ahead
        then = predict(following, ahead)
        slope = (then - prediction) / (following - t)
        x, prediction = follow_line(x, prediction, slope, t, following), then
    return x


def multistep_times(steps: int, start: float = 0.0, end: float = 1.0) -> list[float]:
    """The ends of multistep's steps from `start` to `end`, its share of `steps` from 0 to 1, one at least.

    Spaced evenly in log((t + m) / (1 - t + m)), m = MIN_TIME_LEFT: twice lambda (see `multistep`), but both of its ends
    held back by the floor. A step's error grows with its length cubed, with the curvature of x_hat(t), which is largest
    near the noise, and with 1 / m(t), which is largest near the data; so this is about where short steps are due.
    Half of the digits that 20 steps so spaced make are within 0.0012 of the exact solution's pixels, 0.0014 of
    Fashion-MNIST's; 20 steps with the spacing of `time_shift`, within 0.0032 and 0.0020 (docs/LOG.md).
    """
    begin, whole = smoothed_log_odds(start), 2 * smoothed_log_odds(1)
    length = smoothed_log_odds(end) - begin
    parts = max(1, round(steps * length / whole))
    inner = ((0.5 + MIN_TIME_LEFT) * math.tanh((begin + length * i / parts) / 2) + 0.5 for i in range(1, parts))
    return [start, *inner, end]


def smoothed_log_odds(t: float) -> float:
    """log((t + m) / (1 - t + m)), antisymmetric about t = 1/2; its inverse is 1/2 + (1/2 + m) tanh(v / 2)."""
    return math.log((t + MIN_TIME_LEFT) / (1 - t + MIN_TIME_LEFT))


def follow_line(x: Tensor, prediction: Tensor, slope: Tensor, t0: float, t1: float) -> Tensor:
    """x(t1), exactly, from x(t0), where x_hat(t) = prediction + (t - t0) slope.

    By parts, the integral of (t - t0) d(N1/N) is t1 - t0 - N1 (G(t1) - G(t0)), where G' = 1 / N.
    """
    (n0, g0), (n1, g1) = noise_left(t0), noise_left(t1)
    return n1 / n0 * x + (1 - n1 / n0) * prediction + (t1 - t0 - n1 * (g1 - g0)) * slope


def noise_left(t: float) -> tuple[float, float]:
    """N(t) = exp(-integral of 1/m from 0 to t) and G(t), the integral of 1/N: up to the floor N = 1 - t, from there on
    an exponential."""
    if t < FLOOR_FROM:
        return 1 - t, -math.log1p(-t)
    grown = math.exp((t - FLOOR_FROM) / MIN_TIME_LEFT)
    return MIN_TIME_LEFT / grown, -math.log(MIN_TIME_LEFT) + grown - 1


def dopri5(predict: Prediction, x: Tensor, times: list[float]) -> Tensor:
    """Adaptive Runge-Kutta 5(4) of torchdiffeq. The grid between its ends has no say in the result. How long its steps
    are depends on the whole batch. Where guidance jumps it can err by more than its tolerances say (docs/LOG.md)."""
    from torchdiffeq import odeint  # imports scipy, which no other solver needs

    ends = torch.tensor([times[0], times[-1]], device=x.device, dtype=x.dtype)
    path = odeint(
        lambda t, x: velocity(predict, float(t), x), x, ends, rtol=DOPRI5_RTOL, atol=DOPRI5_ATOL, method="dopri5"
    )
    return path[-1]


RELEASED = {"euler": euler, "heun": heun, "dopri5": dopri5}
"""Those of the released code, which know nothing of where guidance jumps."""
