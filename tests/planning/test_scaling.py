"""Hours by number of GPUs, and what `unite-fast plan` says of them."""

import re
from dataclasses import replace

import pytest

from unite_fast.optim.lr_schedule import learning_rate
from unite_fast.planning.assumptions import FAST, SLOW
from unite_fast.planning.gpus import find_gpu
from unite_fast.planning.launches import step_launches
from unite_fast.planning.predict import Cluster, make_plan
from unite_fast.planning.scaling import LEAST_IMAGES, Scale, by_nodes, grown
from unite_fast.recipes import load_config

H100 = find_gpu("h100")


def plan(nodes: int, *overrides: str, recipe: str = "imagenet256_b"):
    return make_plan(load_config(recipe, overrides), Cluster(H100, nodes, 8))


def test_few_images_per_gpu_are_bound_by_launches():
    many, few = plan(1), plan(64)
    for end, assumed in (("fast", FAST), ("slow", SLOW)):
        assert getattr(many, end).seconds["launches"] == 0 and getattr(many, end).bound_by == "matmuls"
        speed = getattr(few, end)
        # The GPU waits: a step takes the time of the host.
        host = assumed.launch * step_launches(few.config, (512, 1), few.micro_steps, few.collectives)
        assert speed.bound_by == "launches" and sum(speed.seconds.values()) == pytest.approx(host)
        assert speed.images_per_s == pytest.approx(1024 / host)
    # One CUDA graph for all passes.
    graph = plan(64, "train.cuda_graph=true")
    assert graph.slow.bound_by == graph.fast.bound_by == "communication"
    assert graph.slow.images_per_s > 2 * few.slow.images_per_s


def test_latency_grows_with_the_gpus():
    seconds = [plan(nodes, "parallel.strategy=fsdp").slow.seconds["communication"] for nodes in (1, 8, 64)]
    assert seconds[0] < seconds[1] < seconds[2]


def test_hours_stop_falling_where_twice_the_gpus_save_too_little():
    def after(*hours: float) -> Scale:
        plans = [plan(2**k) for k in range(len(hours))]
        rates = [one.images / h / 3600 for one, h in zip(plans, hours, strict=True)]
        ends = [replace(one.fast, images_per_s=rate) for one, rate in zip(plans, rates, strict=True)]
        return Scale([replace(one, fast=end, slow=end) for one, end in zip(plans, ends, strict=True)])

    assert after(8.0, 4.0, 3.7, 3.6).best == (16, 16)
    assert after(8.0, 4.0, 3.5, 3.3).best == (32, 32)
    assert after(8.0, 4.0, 2.0, 1.0).best == (0, 0)
    assert after(8.0, 8.0).best == (8, 8)


def test_numbers_of_nodes_end_where_the_batch_cannot_be_divided():
    scale = by_nodes(load_config("imagenet256_b"), H100, 8)
    assert [one.cluster.nodes for one in scale.plans] == [1, 2, 4, 8, 16, 32, 64, 128]
    small = by_nodes(load_config("imagenet256_b", ("train.batch_size=64",)), H100, 8)
    assert [one.cluster.gpus for one in small.plans] == [8, 16, 32, 64]
    fast, slow = scale.best
    assert 8 < slow <= fast < 1024


@pytest.mark.parametrize(("gpus", "batch"), [(8, 1024), (128, 1024), (24, 1032), (512, 4096), (1000, 8000)])
def test_a_grown_batch_keeps_eight_images_a_gpu_and_the_epochs(gpus, batch):
    config = load_config("imagenet256_b")
    larger = grown(config, gpus)
    train = larger.train
    assert train.batch_size == batch >= LEAST_IMAGES * gpus and train.batch_size % gpus == 0
    assert train.steps * batch == pytest.approx(300240 * 1024, rel=1e-4)
    assert train.batch_size // gpus % min(train.micro_batch, train.batch_size // gpus) == 0
    step = larger.schedule.warmup_steps
    assert learning_rate(larger.schedule, batch, step) == pytest.approx(1e-4 * batch / 384)
    # Steps of a recipe without a unit are kept too.
    digits = grown(load_config("digits"), 16)
    assert (digits.train.batch_size, digits.train.steps, digits.schedule.decay_until) == (128, 750, 750)


def test_the_table_of_a_grown_batch_keeps_the_images():
    for one in by_nodes(load_config("imagenet256_b"), H100, 8, grow=True).plans:
        assert one.images == pytest.approx(300240 * 1024, rel=1e-4)
        assert one.config.train.batch_size // one.cluster.gpus >= LEAST_IMAGES


def test_the_command_prints_the_tables(command, mentions):
    out = command("plan", "imagenet256_b", "--gpu", "h100", "--scaling").out
    assert re.match(mentions("PREDICTION", "imagenet256_b", "h100"), out)
    for gpus, batches in ((8, (1024, 1024)), (64, (1024, 1024)), (512, (1024, 4096))):
        rows = [line.split() for line in out.splitlines() if line.split()[:1] == [str(gpus)]]
        assert [(int(row[1]), int(row[2])) for row in rows] == [(batch, batch // gpus) for batch in batches]
    scale = by_nodes(load_config("imagenet256_b"), H100, 8)
    assert re.search(mentions("hours stop falling", *(f"{gpus} GPUs" for gpus in scale.best)), out)
    assert f"{scale.plans[0].hours[0]:.1f} to {scale.plans[0].hours[1]:.1f}" in out


def test_the_plan_warns_of_few_images_and_says_the_rate_and_the_length(command, mentions):
    few = command("plan", "imagenet256_b", "--nodes", 32)
    assert re.search(mentions("WARNING", "4 images", 8, "train.batch_size"), few.out)
    many = command("plan", "imagenet256_b", "--nodes", 16, "train.batch_size=2048")
    assert "WARNING" not in many.out and "1e-04 x 2048" not in many.out
    assert re.search(mentions("learning rate 0.000533", "2048 / 384", "linear"), many.out)
    assert re.search(mentions("150120 steps", "307.4 M images"), many.out)
    assert re.search(mentions(2048, 1024, "as many"), many.out)
    small = command("plan", "imagenet256_xl", "--gpu", "l4", "parallel.strategy=ddp", "train.micro_batch=128")
    assert "hours stop" not in small.out, "it does not fit"
