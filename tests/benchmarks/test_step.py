"""Counts of benchmarks/step.py against counts by hand, and on the step of the trainer."""

import importlib
from pathlib import Path

import pytest
import torch

from unite_fast.kernels import backend, native
from unite_fast.training.train_step import TrainStep

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(not native.available(), reason=native.reason() or "built")


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("step")


def test_operators_and_their_bytes(step):
    x, weight = torch.ones(4, 8), torch.ones(8, 16)
    with step.Traffic() as traffic:
        y = (x @ weight).t().detach()  # a matmul, a view, and nothing
        torch.empty(100)
        y + 1
    matmul, addition = 4 * (32 + 128 + 64), 4 * (64 + 64)
    assert (traffic.ops, traffic.bytes) == (2, matmul + addition)


def test_bytes_that_a_pass_saves(step):
    layer = torch.nn.Linear(8, 16)
    x = torch.ones(4, 8)
    saved = step.Saved(layer)
    with saved:
        layer(x).square().sum().backward()  # x, and the layer's output once, although two ops save it; no weights
        layer(x).sum().backward()  # x
    assert saved.passes == [4 * (32 + 64), 4 * 32]


@needs_native
def test_the_trainers_step_is_counted(step, monkeypatch):
    batches = []
    call = TrainStep.__call__
    monkeypatch.setattr(TrainStep, "__call__", lambda self, batch: batches.append(batch) or call(self, batch))
    counts = {}
    for name in ("native", "reference"):
        with backend.using(name):
            counts[name] = step.count(*step.make_step("tiny", 2, False, CPU))
    assert len(batches) == 4 and batches[0].data.dtype == torch.uint8
    fast, reference = counts["native"], counts["reference"]
    for name in ("saved_reconstruction_mb_per_image", "saved_flow_mb_per_image", "moved_mb_per_image", "ops_per_step"):
        assert 0 < fast[name] < 0.7 * reference[name], name
    assert fast["gflop_per_image"] == reference["gflop_per_image"]
    total = fast["saved_reconstruction_mb_per_image"] + fast["saved_flow_mb_per_image"]
    assert fast["saved_mb_per_image"] == pytest.approx(total)
