import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from unite_fast.config import ScheduleConfig
from unite_fast.optim.lr_schedule import learning_rate

TRACE = Path(__file__).parents[1] / "data" / "official_tiny_a.npz"

FULL = ScheduleConfig(
    lr=1.0, lr_2=0.5, lr_final=0.1, reference_batch=0,
    warmup_steps=10, hold_until=20, decay_until=40, final_from=60, final_until=100,
)  # fmt: skip


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.0),
        (5, 0.5),
        (9, 0.9),
        (10, 1.0),
        (19, 1.0),
        (20, 1.0),
        (25, 0.5 + 0.5 * 0.8535533905932737),  # cos(pi / 4), as (1 + cos) / 2
        (30, 0.75),
        (40, 0.5),
        (59, 0.5),
        (60, 0.5),
        (80, 0.3),
        (100, 0.1),
        (10**6, 0.1),
    ],
)
def test_rates_of_every_stage(step, rate):
    assert learning_rate(FULL, 384, step) == pytest.approx(rate, rel=1e-12)


def test_the_rate_never_jumps():
    rates = [learning_rate(FULL, 384, step) for step in range(120)]
    largest = max(abs(a - b) for a, b in pairwise(rates))
    assert largest <= 0.1 + 1e-12  # a step of the warm-up
    after_warmup = rates[10:]
    assert after_warmup == sorted(after_warmup, reverse=True)


def test_rates_match_the_trace():
    meta = json.loads(bytes(np.load(TRACE)["meta_json"]))
    schedule = meta["optim"]["schedule"]
    config = ScheduleConfig(
        lr=schedule["base_lr_1"],
        lr_2=schedule["base_lr_2"],
        reference_batch=0,
        warmup_steps=schedule["warmup_steps"],
        hold_until=schedule["hold_1_until"],
        decay_until=schedule["decay_1_until"],
    )
    for step, row in enumerate(meta["losses"]):
        assert learning_rate(config, 2, step) == pytest.approx(row["lr"], rel=1e-12)


def test_the_rate_scales_with_the_batch():
    config = ScheduleConfig()
    assert learning_rate(config, 1024, 7) == pytest.approx(1e-4 * 1024 / 384)
    assert learning_rate(config, 384, 7) == 1e-4
    assert learning_rate(ScheduleConfig(reference_batch=0), 1024, 7) == 1e-4


def test_all_three_rates_scale_with_the_batch():
    config = ScheduleConfig(decay_until=10, final_from=20, final_until=30)
    assert learning_rate(config, 768, 15) == pytest.approx(1e-4)
    assert learning_rate(config, 768, 30) == pytest.approx(2e-5)


def test_without_a_first_decay_the_rate_stays_at_lr():
    config = ScheduleConfig(lr=1.0, reference_batch=0, warmup_steps=2)
    assert [learning_rate(config, 1, step) for step in (0, 1, 2, 10**6)] == [0.0, 0.5, 1.0, 1.0]


def test_without_a_last_decay_the_rate_stays_at_lr_2():
    config = ScheduleConfig(lr=1.0, lr_2=0.5, reference_batch=0, hold_until=4, decay_until=8)
    assert learning_rate(config, 1, 10**6) == 0.5


def test_decays_of_zero_length_are_jumps():
    config = ScheduleConfig(
        lr=1.0, lr_2=0.5, lr_final=0.1, reference_batch=0, hold_until=4, decay_until=4, final_from=6, final_until=6
    )
    assert [learning_rate(config, 1, step) for step in (3, 4, 5, 6)] == [1.0, 0.5, 0.5, 0.1]
