"""Traces of some steps."""

import gzip
import json
import os

import pytest
import torch

from unite_fast.config import ProfileConfig
from unite_fast.errors import UserError
from unite_fast.training.profiling import StepProfiler

CPU = torch.device("cpu")


def traced(profiler: StepProfiler, steps: range) -> None:
    for step in steps:
        profiler.before(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(3) + 1
        profiler.after(step)


def steps_in(path) -> list[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted({event["name"] for event in events if event.get("name", "").startswith("step ")})


def test_the_steps_asked_for_are_in_the_trace(tmp_path):
    said = []
    profiler = StepProfiler(ProfileConfig("3:5"), tmp_path, CPU, said.append)
    traced(profiler, range(1, 8))
    profiler.close()
    path = tmp_path / "profile" / "rank0_step3.json.gz"
    assert steps_in(path) == ["step 3", "step 4"]
    assert os.listdir(path.parent) == [path.name]
    assert len(said) == 1 and str(path) in said[0]


def test_a_run_that_begins_or_ends_in_between_leaves_what_it_has(tmp_path):
    profiler = StepProfiler(ProfileConfig("3:9"), tmp_path, CPU, lambda line: None)
    traced(profiler, range(5, 7))
    profiler.close()
    profiler.close()
    assert steps_in(tmp_path / "profile" / "rank0_step5.json.gz") == ["step 5", "step 6"]


def test_nothing_is_traced_unasked(tmp_path):
    profiler = StepProfiler(ProfileConfig(), tmp_path, CPU, lambda line: None)
    traced(profiler, range(1, 4))
    profiler.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "steps", ["10", "5:5", "13:10", "0:3", "a:b", ":", "1:", "-1:3", "1:2:3", "1:²", "1:99999999999999999999"]
)
def test_a_bad_range_is_named(steps, mentions):
    with pytest.raises(UserError, match=mentions("profile.steps")):
        ProfileConfig(steps)


def test_what_cannot_be_written_is_named(tmp_path, mentions):
    (tmp_path / "profile").write_text("in the way")
    profiler = StepProfiler(ProfileConfig("1:2"), tmp_path, CPU, lambda line: None)
    with pytest.raises(UserError, match=mentions(tmp_path / "profile" / "rank0_step1.json.gz")):
        traced(profiler, range(1, 3))
