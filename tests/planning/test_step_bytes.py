"""The traffic of a step from its config, against sums by hand."""

import importlib
import sys
from pathlib import Path

import pytest

from unite_fast.config import Config
from unite_fast.planning import flops, step_bytes
from unite_fast.recipes import from_tree


def config(draws: int = 3, batch: int = 8, **train) -> Config:
    size = {"width": 384, "depth": 6, "heads": 6}
    tree = {
        "model": {"encoder": size, "decoder": size | {"mlp_width": 1536}},
        "objective": {"flow_draws": draws},
        "perceptual": {"weight": 0.0},
        "train": {"batch_size": batch, **train},
    }
    return from_tree(Config, tree)


def test_a_block_by_hand():
    """Per (token x channel), forward and backward: 32 numbers of 2 bytes in and out of four Linears, three products
    each; attention; the rest."""
    parts = step_bytes.step_bytes(config())
    # Tokens x blocks: 512, 544 with in-context tokens, and half of the last block's work on 256 queries.
    tokens = 4 * 512 + 544 + (544 + 256) / 2 + 3 * (4 * 256 + 288 + (288 + 256) / 2)
    assert parts["encoder blocks: attention"] == pytest.approx(36 * tokens * 384)
    assert parts["encoder blocks: elementwise and norms"] == pytest.approx(step_bytes.BLOCK_BYTES * tokens * 384)
    assert parts["encoder blocks: matmuls"] == pytest.approx(3 * 32 * tokens * 384, rel=0.02)
    assert parts["decoder layers: matmuls"] == pytest.approx(3 * 32 * 6 * 257 * 384)


def test_weights_and_optimizers_are_shared_by_the_images():
    few, many, split = (
        step_bytes.step_bytes(each) for each in (config(), config(batch=32), config(batch=32, micro_batch=8))
    )
    shapes = flops.parameter_shapes(config().model)
    muon, adamw = (flops.numel([each for each in shapes if each.muon == chosen]) for chosen in (True, False))
    assert few["optimizers"] == pytest.approx((step_bytes.MUON_BYTES * muon + step_bytes.ADAMW_BYTES * adamw) / 8)
    assert few["Newton-Schulz"] == pytest.approx(step_bytes.NEWTON_SCHULZ_BYTES * muon / 8)
    shared = ("optimizers", "Newton-Schulz", "weights and their gradients")
    assert all(many[name] == pytest.approx(few[name] / 4) for name in shared)
    assert split[shared[2]] == few[shared[2]] and split[shared[0]] == many[shared[0]]
    assert all(few[name] == many[name] for name in few.keys() - {*shared})


def test_flow_draws_cost_blocks_alone():
    three, four = (step_bytes.step_bytes(config(draws)) for draws in (3, 4))
    grew = {name for name in three if four[name] > three[name]}
    assert grew == {name for name in three if name.startswith("encoder blocks")} | {"first and last Linears"}


def test_the_command_prints_it(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    traffic = importlib.import_module("traffic")
    sys.modules.pop("traffic")
    report = traffic.step_report()
    for name, size in step_bytes.step_bytes(config()).items():
        assert name in report and f"{size / 1e6:10.1f}" in report
