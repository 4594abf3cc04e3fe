"""Checkpoints by steps, by minutes, and by both."""

import pytest

from unite_fast.config import TrainConfig
from unite_fast.errors import UserError
from unite_fast.training.checkpoint_schedule import CheckpointSchedule


def saves(config: TrainConfig, seconds_per_step: float, steps: int) -> list[int]:
    """Steps at which one process saves."""
    schedule, now, saved = CheckpointSchedule(config, 100.0), 100.0, []
    for step in range(1, steps + 1):
        now += seconds_per_step
        if schedule.due(step) or schedule.minutes_due(now):
            schedule.saved(step, now)
            saved.append(step)
            assert schedule.saved_step == step
    return saved


def test_by_steps_alone():
    assert saves(TrainConfig(checkpoint_every=4), 1000.0, 12) == [4, 8, 12]
    assert saves(TrainConfig(checkpoint_every=4), 0.0, 12) == [4, 8, 12]


def test_by_minutes_alone():
    config = TrainConfig(checkpoint_every=0, checkpoint_minutes=0.5)
    assert saves(config, 10.0, 10) == [3, 6, 9]
    assert saves(config, 45.0, 3) == [1, 2, 3], "one per step at most"
    assert saves(config, 0.01, 1000) == []


def test_any_save_starts_the_minutes_again():
    config = TrainConfig(checkpoint_every=4, checkpoint_minutes=0.5)
    assert saves(config, 10.0, 12) == [3, 4, 7, 8, 11, 12]
    assert saves(config, 1.0, 12) == [4, 8, 12], "short steps: the minutes never come"


def test_without_a_save_there_is_no_saved_step():
    assert CheckpointSchedule(TrainConfig(), 0.0).saved_step is None


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"checkpoint_every": 0}, "train.checkpoint_every"),
        ({"checkpoint_every": -1, "checkpoint_minutes": 1.0}, "train.checkpoint_every"),
        ({"checkpoint_minutes": -1.0}, "train.checkpoint_minutes"),
        ({"checkpoint_minutes": float("nan")}, "train.checkpoint_minutes"),
        ({"checkpoint_every": 0, "checkpoint_minutes": 1.0, "keep_every": 100}, "train.keep_every"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings, key):
    with pytest.raises(UserError, match=key):
        TrainConfig(**settings)
