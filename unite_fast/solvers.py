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
    """Second order at one prediction a step: DPM-Solver++(2M) of Lu et al. (arXiv 2211.01095), derived for our path.

    Let N(t) be the noise that is left: N' = -N / m(t), N(0) = 1 (see `noise_left`). But for x_hat the equation is
    linear, and variation of constants solves it exactly:

        x(t1) = N1/N0 x(t0) + integral, for t from t0 to t1, of x_hat(t) d(N1/N(t)).

    This is a weighted mean of x and of the predictions, since N1/N(t) rises from N1/N0 to 1. The rule puts one value
    for all of them, that in the middle of the step on the straight line through this prediction and the last one; with
    r = (t1 - t0) / (t0 - t_last),

        x(t1) = N1/N0 x(t0) + (1 - N1/N0) (x_hat + r/2 (x_hat - x_hat_last)).

    The error of a step is O(step^3). The first step has no prediction before it and holds x_hat, which on this path is
    Euler's step. DPM-Solver++ counts in half the log signal-to-noise ratio, lambda = log(t / (1 - t)) = log t - log N;
    N is finite at both ends, where lambda is not. Where the middle lies is a choice. In lambda, theirs, 8 steps of the
    digits and of Fashion-MNIST ended three times as far from the exact solution as in t: the predictions hardly change
    any more towards the end, where lambda runs fastest.

    The floor of m is no approximation here: N goes on past it exactly, so the end point is that of the equation which
    the other solvers integrate. It is not quite a prediction: N(1) = 0.05 / e = 1.8 % of the noise is left in it.
    """
    previous, before = None, 0.0
    for t, following in pairwise(times):
        prediction = predict(t, x)
        middle = prediction
        if previous is not None:
            middle = prediction + (following - t) / (t - before) / 2 * (prediction - previous)
        kept = noise_left(following) / noise_left(t)
        x = kept * x + (1 - kept) * middle
        previous, before = prediction, t
    return x


def noise_left(t: float) -> float:
    """N(t) = exp(-integral of 1/m from 0 to t): 1 - t, and from the floor on an exponential."""
    kink = 1 - MIN_TIME_LEFT
    return 1 - t if t < kink else MIN_TIME_LEFT * math.exp((kink - t) / MIN_TIME_LEFT)


def dopri5(predict: Prediction, x: Tensor, times: list[float]) -> Tensor:
    """Adaptive Runge-Kutta 5(4) of torchdiffeq. The grid between its ends has no say in the result. How long its steps
    are depends on the whole batch."""
    from torchdiffeq import odeint

    ends = torch.tensor([times[0], times[-1]], device=x.device, dtype=x.dtype)
    path = odeint(
        lambda t, x: velocity(predict, float(t), x), x, ends, rtol=DOPRI5_RTOL, atol=DOPRI5_ATOL, method="dopri5"
    )
    return path[-1]


SOLVERS = {"euler": euler, "heun": heun, "multistep": multistep, "dopri5": dopri5}
