import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from unite_fast.config import ScheduleConfig
from unite_fast.optim.lr_schedule import describe_rate, learning_rate
from unite_fast.recipes import load_config

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


@pytest.mark.parametrize(
    ("rule", "reference", "rate", "said"),
    [
        ("linear", 384, 1e-4 * 1024 / 384, "learning rate 0.000267: 0.0001 x 1024 / 384 (linear)"),
        ("square_root", 256, 2e-4, "learning rate 0.0002: 0.0001 x sqrt(1024 / 256) (square_root)"),
        ("none", 384, 1e-4, "learning rate 0.0001, the same at every batch size"),
        ("linear", 0, 1e-4, "learning rate 0.0001, the same at every batch size"),
    ],
)
def test_the_rule_of_the_batch_is_applied_and_said(rule, reference, rate, said):
    config = ScheduleConfig(batch_rule=rule, reference_batch=reference)
    assert learning_rate(config, 1024, 7) == pytest.approx(rate, rel=1e-12)
    assert describe_rate(config, 1024) == said


# Of the recipes as they were when they stated steps alone (commit a9660dd).
PUBLISHED = ScheduleConfig(
    lr=1.0e-4, lr_2=0.5e-4, reference_batch=384, warmup_steps=50040, hold_until=75060, decay_until=125100
)


@pytest.mark.parametrize("recipe", ["imagenet256_b", "imagenet256_l", "imagenet256_xl"])
def test_the_published_recipes_keep_their_rates(recipe):
    config = load_config(recipe)
    larger = load_config(recipe, ("train.batch_size=8192",))
    for step in (0, 1, 777, 50039, 50040, 75059, 75060, 75061, 99999, 125099, 125100, 300239):
        assert learning_rate(config.schedule, 1024, step) == learning_rate(PUBLISHED, 1024, step)
        # After as many images, eight times the rate; points are rounded to whole steps.
        after = learning_rate(larger.schedule, 8192, step // 8)
        assert after == pytest.approx(8 * learning_rate(PUBLISHED, 1024, step // 8 * 8), rel=1e-4)


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
