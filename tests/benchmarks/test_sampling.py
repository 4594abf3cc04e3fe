"""Which solver the benchmark chooses, and the released procedure that it compares with."""

import pytest
import torch

from benchmarks.sampling import STEPS, AlwaysBoth, choose
from unite_fast.config import SamplingConfig
from unite_fast.sampling.sampler import GuidedPrediction


def result(**rows: tuple[float, float]) -> dict:
    """`rows`: solver_steps = evaluations, relative distance to dopri5's. Other rows do not match."""
    names = [("dopri5", 0), *((solver, steps) for solver, numbers in STEPS.items() for steps in numbers)]
    table = []
    for solver, steps in names:
        evaluations, against = rows.get(f"{solver}_{steps}", (150.0 if solver == "dopri5" else 20.0, 0.5))
        table.append({"solver": solver, "steps": steps, "evaluations": evaluations, "against_dopri5": against})
    return {"rows": table}


GOOD = {f"multistep_{n}": (2.0 * n, against) for n, against in ((12, 0.0), (16, -0.01), (20, 0.01), (24, 0.003))}


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({}, ("multistep", 12)),
        ({"euler_10": (10.0, 0.0)}, ("multistep", 12)),  # by luck: 20 steps are worse
        ({"multistep_16": (32.0, 0.011)}, ("multistep", 20)),
        ({"multistep_16": (32.0, -0.011)}, ("multistep", 20)),  # nearer the data than dopri5 is no match either
        ({"multistep_12": (51.0, 0.0)}, ("multistep", 16)),  # not three times cheaper
        ({"heun_10": (20.0, 0.0), "heun_20": (40.0, 0.0)}, ("heun", 10)),
        ({"multistep_24": (48.0, 0.5)}, None),
    ],
)
def test_the_cheapest_solver_that_matches_also_with_more_steps(others, expected):
    assert choose([result(**(GOOD | others))]) == expected


def test_it_must_match_on_every_run():
    worse = GOOD | {"multistep_12": (24.0, 0.02)}
    assert choose([result(**GOOD), result(**worse)]) == ("multistep", 16)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_released_procedure_predicts_the_same_with_one_more_pass(t):
    def denoise(x, times, labels):
        return x + labels[:, None, None]

    x, labels = torch.ones(2, 1, 1), torch.tensor([1, 2])
    config = SamplingConfig(guidance=3.0, interval=(0.2, 0.8))
    ours, theirs = (kind(denoise, labels, 5, config) for kind in (GuidedPrediction, AlwaysBoth))
    assert torch.equal(ours(t, x), theirs(t, x))
    assert (ours.evaluations, theirs.evaluations) == (2 if t == 0.5 else 1, 2)
