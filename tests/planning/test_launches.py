"""Launches of a step, compared with benchmarks/launches.py, which counts them."""

import importlib
import sys
from pathlib import Path

import pytest

from unite_fast.planning.assumptions import Cluster
from unite_fast.planning.communication import collectives
from unite_fast.planning.gpus import find_gpu
from unite_fast.planning.launches import micro_batch_launches, optimizer_launches, step_launches
from unite_fast.recipes import load_config


@pytest.fixture(scope="module")
def launches():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("launches")
    finally:
        sys.path.remove(folder)
        sys.modules.pop("launches", None)


@pytest.mark.parametrize(
    ("recipe", "changes", "within"),
    [
        ("imagenet256_b", (), 0.0),
        ("imagenet256_l", ("model.encoder.depth=6", "model.decoder.depth=2", "perceptual.weight=0"), 0.06),
    ],
)
def test_the_numbers_are_those_of_the_count(recipe, changes, within, launches):
    config = load_config(recipe, changes)
    counted = launches.count(config, 8)
    assert micro_batch_launches(config) == pytest.approx(launches.total(counted), rel=within)
    # The count has the optimizers' of one process.
    assert optimizer_launches(config, 1, 1) == sum(counted["optimizer"].values())


def test_a_step_launches_its_micro_batches_and_collectives():
    config, cluster = load_config("imagenet256_b"), Cluster(find_gpu("h100"), 1, 8)
    once = micro_batch_launches(config)
    assert step_launches(config, (1, 1), 4, []) == 4 * once + optimizer_launches(config, 1, 1)
    several = step_launches(config, (8, 1), 2, collectives(config, cluster, "ddp", 2))
    assert 2 * once < several < 3 * once + 1000
    # More ranks own fewer batches of matrices each.
    one, eight, all_apart = (optimizer_launches(config, replicas, 1) for replicas in (1, 8, 512))
    assert 196 == one > eight > all_apart == 25
    graph = load_config("imagenet256_b", ("train.cuda_graph=true",))
    assert step_launches(graph, (1, 1), 4, []) == 1 + optimizer_launches(config, 1, 1)
