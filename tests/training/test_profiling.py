"""Profiler traces of selected steps."""

import gzip
import json
import os

import pytest
import torch

from unite_fast.config import ProfileConfig
from unite_fast.errors import UserError
from unite_fast.training.profiling import StepProfiler

CPU = torch.device("cpu")


def run_steps(profiler: StepProfiler, steps: range) -> None:
    for step in steps:
        profiler.before(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(3) + 1
        profiler.after(step)


def steps_in_trace(path) -> list[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted({event["name"] for event in events if event.get("name", "").startswith("step ")})


def test_the_trace_has_the_selected_steps(tmp_path):
    messages = []
    profiler = StepProfiler(ProfileConfig("3:5"), tmp_path, CPU, messages.append)
    run_steps(profiler, range(1, 8))
    profiler.close()
    path = tmp_path / "profile" / "rank0_step3.json.gz"
    assert steps_in_trace(path) == ["step 3", "step 4"]
    assert os.listdir(path.parent) == [path.name]
    assert len(messages) == 1 and str(path) in messages[0]


def test_a_run_that_covers_part_of_the_range_writes_that_part(tmp_path):
    profiler = StepProfiler(ProfileConfig("3:9"), tmp_path, CPU, lambda line: None)
    run_steps(profiler, range(5, 7))
    profiler.close()
    profiler.close()
    assert steps_in_trace(tmp_path / "profile" / "rank0_step5.json.gz") == ["step 5", "step 6"]


def test_profiling_is_off_by_default(tmp_path):
    profiler = StepProfiler(ProfileConfig(), tmp_path, CPU, lambda line: None)
    run_steps(profiler, range(1, 4))
    profiler.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "steps", ["10", "5:5", "13:10", "0:3", "a:b", ":", "1:", "-1:3", "1:2:3", "1:²", "1:99999999999999999999"]
)
def test_a_bad_range_is_an_error(steps, mentions):
    with pytest.raises(UserError, match=mentions("profile.steps")):
        ProfileConfig(steps)


def test_a_trace_that_cannot_be_written_is_an_error(tmp_path, mentions):
    (tmp_path / "profile").write_text("in the way")
    profiler = StepProfiler(ProfileConfig("1:2"), tmp_path, CPU, lambda line: None)
    with pytest.raises(UserError, match=mentions(tmp_path / "profile" / "rank0_step1.json.gz")):
        run_steps(profiler, range(1, 3))
