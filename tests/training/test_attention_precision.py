"""The precision of attention on a CPU: measured once, the same for all processes, and kept on resume."""

import os
from collections import Counter
from dataclasses import replace

import pytest
import torch

from unite_fast import kernels
from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.data_pipeline import Batch
from unite_fast.kernels import backend, matmul
from unite_fast.kernels.attention_backends import ON_CPU
from unite_fast.model.unite import UNITE
from unite_fast.recipes import load_config
from unite_fast.training import attention_precision
from unite_fast.training.attention_precision import attention_shapes, choose, measure
from unite_fast.training.train_state import TrainState
from unite_fast.training.train_step import TrainStep
from unite_fast.training.trainer import train

CPU = torch.device("cpu")
really_seconds = attention_precision.seconds


@pytest.fixture(autouse=True)
def instructions(monkeypatch):
    """As on a CPU with bfloat16 instructions."""
    monkeypatch.setattr(matmul, "bfloat16_instructions", lambda: True)


@pytest.fixture
def settings(tiny_run, tmp_path):
    half = "train.precision=bfloat16"

    def make(*overrides: str, folder: str = "run"):
        return load_config("digits", (*tiny_run, half, f"train.out={tmp_path / folder}", *overrides))

    return make


def make_faster(name: str, monkeypatch) -> None:
    monkeypatch.setattr(attention_precision, "seconds", lambda shape, other: 1.0 if other == name else 2.0)


def test_shapes_and_numbers_are_those_of_a_step(tiny_config, monkeypatch):
    seen, attention = Counter(), kernels.attention

    def record(qkv, heads, *others, **named):
        seen[qkv.shape[1], qkv.shape[2] // 3 // heads] += 1
        return attention(qkv, heads, *others, **named)

    monkeypatch.setattr(kernels, "attention", record)
    state = TrainState(UNITE.create(tiny_config.model, seed=0), tiny_config)
    images = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    TrainStep(state, tiny_config).accumulate(Batch(images, torch.zeros(6, dtype=torch.int64), []))
    # All draws of the flow pass are in one call of each block.
    one = attention_shapes(replace(tiny_config, objective=replace(tiny_config.objective, flow_draws=1)))
    assert seen == one
    further = tiny_config.objective.flow_draws - 1
    assert attention_shapes(tiny_config).total() - one.total() == further * tiny_config.model.encoder.depth > 0


@pytest.mark.parametrize("name", ON_CPU)
def test_the_faster_precision_is_chosen(name, tiny_config, monkeypatch):
    make_faster(name, monkeypatch)
    chosen, note = choose(tiny_config, "")
    assert chosen == name and "2.00 times" in note and f"attention={name}" in note


@pytest.mark.parametrize(("long_passes", "chosen"), [(1, "sdpa_float32"), (3, "sdpa_bfloat16")])
def test_shapes_count_as_often_as_they_occur(long_passes, chosen, monkeypatch):
    """float32 loses 2 s on each long sequence and gains 1 s on each of four short ones."""
    times = {(64, "sdpa_bfloat16"): 2, (64, "sdpa_float32"): 4, (4, "sdpa_bfloat16"): 2, (4, "sdpa_float32"): 1}
    monkeypatch.setattr(attention_precision, "seconds", lambda shape, name: times[shape[0], name])
    result = measure(Counter({(64, 8): long_passes, (4, 8): 4}))
    assert result == {"sdpa_bfloat16": 2 * long_passes + 8, "sdpa_float32": 4 * long_passes + 4}
    assert min(result, key=result.get) == chosen


def test_the_least_of_several_rounds_counts(monkeypatch):
    rounds = iter([9.0, 9.0, 3.0, 5.0, 4.0, 2.0])
    monkeypatch.setattr(attention_precision, "seconds", lambda shape, name: next(rounds))
    monkeypatch.setattr(attention_precision, "SECONDS", 0.0)
    assert measure(Counter({(4, 8): 1})) == {"sdpa_bfloat16": 3.0, "sdpa_float32": 2.0}


def test_a_real_measurement(tiny_config, monkeypatch):
    monkeypatch.setattr(attention_precision, "seconds", really_seconds)
    dtypes = set()
    for shape in attention_shapes(tiny_config):
        for name in ON_CPU:
            assert 0 < really_seconds(shape, name) < 10
            dtypes.add(backend.attention_on(CPU))
    assert dtypes == set(ON_CPU)
    torch.set_num_threads(2)
    try:
        assert all(seconds > 0 for seconds in measure(attention_shapes(tiny_config)).values())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_nothing_is_measured_where_there_is_no_choice(tiny_config, monkeypatch):
    make_faster("sdpa_float32", monkeypatch)
    deterministic = replace(tiny_config, train=replace(tiny_config.train, deterministic=True))
    assert choose(deterministic, "") == ("sdpa_bfloat16", "")
    assert choose(tiny_config, "sdpa_bfloat16") == ("sdpa_bfloat16", "")
    assert choose(deterministic, "sdpa_float32") == ("sdpa_float32", "")
    # Saved by a GPU.
    assert choose(tiny_config, "sdpa")[0] == choose(tiny_config, "flash_attn")[0] == "sdpa_float32"
    with backend.using("reference"):
        assert choose(tiny_config, "") == ("sdpa", "")
    monkeypatch.setattr(matmul, "bfloat16_instructions", lambda: False)
    assert choose(tiny_config, "sdpa_bfloat16") == ("sdpa", "")


def test_a_run_says_and_saves_its_choice_and_keeps_it_on_resume(settings, monkeypatch, capfd, assert_same_run):
    make_faster("sdpa_float32", monkeypatch)
    whole = train(settings(folder="whole"))
    assert load_checkpoint(whole.folder).progress["attention"] == "sdpa_float32"
    printed = capfd.readouterr().out
    assert "sdpa_float32 attention" in printed and "attention: sdpa_float32 is 2.00 times" in printed
    train(settings("train.steps=7"))
    make_faster("sdpa_bfloat16", monkeypatch)
    resumed = train(settings(), resume=True)
    assert_same_run(whole.folder, resumed.folder)
    assert backend.attention_on(CPU) == load_checkpoint(resumed.folder).progress["attention"] == "sdpa_float32"
    assert "times as fast" not in capfd.readouterr().out.split("resuming")[1]
    other = train(settings(folder="other"))
    assert load_checkpoint(other.folder).progress["attention"] == "sdpa_bfloat16"
    with pytest.raises(AssertionError):
        assert_same_run(whole.folder, other.folder)


def test_a_setting_takes_the_place_of_the_measurement(settings, monkeypatch):
    make_faster("sdpa_float32", monkeypatch)
    run = train(settings("attention=sdpa_bfloat16", "train.steps=1"))
    assert load_checkpoint(run.folder).progress["attention"] == "sdpa_bfloat16"


def test_a_float32_run_measures_nothing(settings, monkeypatch):
    monkeypatch.setattr(attention_precision, "choose", None)
    run = train(settings("train.precision=float32", "train.steps=1"))
    assert load_checkpoint(run.folder).progress["attention"] == "sdpa"


def test_attention_of_a_float8_run_is_measured_too(settings, monkeypatch):
    make_faster("sdpa_float32", monkeypatch)
    run = train(settings("train.precision=float8", "train.steps=1"))
    assert load_checkpoint(run.folder).progress["attention"] == "sdpa_float32"


def train_with_own_timings(config) -> str:
    faster = ("sdpa_float32", "sdpa_bfloat16")[int(os.environ["RANK"])]
    with pytest.MonkeyPatch.context() as patch:
        make_faster(faster, patch)
        train(config)
        return backend.attention_on(CPU)


def test_all_ranks_take_the_choice_of_rank_0(settings, ranks):
    config = settings("train.steps=2")
    assert ranks(2, train_with_own_timings, config) == ["sdpa_float32", "sdpa_float32"]
    assert load_checkpoint(config.train.out).progress["attention"] == "sdpa_float32"
