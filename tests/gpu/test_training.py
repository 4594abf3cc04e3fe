"""Training on a GPU: a step matches the CPU, runs repeat and resume bit for bit, ordinary steps do not synchronize."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from unite_fast.config import Config
from unite_fast.data_pipeline import Batch
from unite_fast.distributed.process_group import ALONE
from unite_fast.kernels import backend, native
from unite_fast.recipes import from_tree, load_config
from unite_fast.training.cuda_graph import SETTLED
from unite_fast.training.metrics import Averages
from unite_fast.training.parallelize import build_model
from unite_fast.training.train_state import TrainState
from unite_fast.training.train_step import TrainStep
from unite_fast.training.trainer import Trainer, train

pytestmark = pytest.mark.gpu

LOSS, GRADIENT, WEIGHT = 1e-5, 1e-3, 1e-2
"""Relative tolerances in float32, of a loss, of a tensor's gradient, and of a tensor's change in a step, where
Newton-Schulz iterations amplify rounding. The same as in interop/parity.py, which compares with the released code."""
SHARE = 1e-5
"""Share of the whole gradient's norm. A tensor's error below it passes, however small its own gradient is."""

SMALL = {
    "model": {
        "image_size": 32,
        "patch_size": 8,
        "latent_channels": 6,
        "num_classes": 5,
        "encoder": {"width": 64, "depth": 3, "heads": 2, "in_context_tokens": 3, "in_context_start": 1},
        "decoder": {"width": 48, "depth": 2, "heads": 3, "mlp_width": 80, "embed_width": 40},
    },
    "perceptual": {"weight": 0.5},
    "optim": {"muon_dtype": "float32"},
    "schedule": {"lr": 1e-3, "lr_2": 5e-4, "reference_batch": 0},
    "train": {"batch_size": 6, "micro_batch": 3, "steps": 10, "precision": "float32", "compile": False},
}


@pytest.fixture
def make_step(random_lpips):
    """Makes a step with the same initial weights on any device."""

    def make(config: Config, device: torch.device) -> TrainStep:
        model, _ = build_model(config, ALONE, torch.device("cpu"))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():  # modulation, gates and output are zero at initialization
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        lpips = random_lpips().to(device) if config.perceptual.weight else None
        return TrainStep(
            TrainState(model.to(device), config), config, micro_batch=config.train.micro_batch, lpips=lpips
        )

    return make


def make_batch(config: Config, on_cuda: bool) -> Batch:
    generator = torch.Generator().manual_seed(2)
    b, side = config.train.batch_size, config.model.image_size
    images = torch.randint(256, (b, 3, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.randint(config.model.num_classes, (b,), generator=generator)
    if on_cuda:
        images, labels = images.pin_memory(), labels.pin_memory()
    return Batch(images, labels, torch.arange(b))


def test_one_step_matches_the_cpu(make_step, device, on_cuda, backend_name, record_property):
    """Losses, gradients and weights of a whole step: draws, both passes, LPIPS, clipping, Muon and AdamW, EMA."""
    config = from_tree(Config, SMALL)
    results = {}
    cpu_backend = "native" if on_cuda and native.available() else "reference"
    for name, kind, where in (("ours", backend_name, device), ("cpu", cpu_backend, torch.device("cpu"))):
        with backend.using(kind):
            step, batch = make_step(config, where), make_batch(config, on_cuda)
            before = {key: value.detach().cpu().clone() for key, value in step.state.model.named_parameters()}
            losses = step.accumulate(batch)
            gradients = {key: p.grad.cpu().clone() for key, p in step.state.model.named_parameters()}
            norm = step.state.apply_gradients()
            after = {key: value.detach().cpu().clone() for key, value in step.state.model.named_parameters()}
            ema = {key: value.detach().cpu().clone() for key, value in step.state.ema.averages.items()}
        numbers = {key: getattr(losses, key).item() for key in ("total", "l1", "flow", "lpips")}
        results[name] = (numbers | {"norm": norm.item()}, gradients, before, after, ema)
    (numbers, gradients, before, after, ema), (cpu_numbers, cpu_gradients, cpu_before, cpu_after, cpu_ema) = (
        results.values()
    )
    assert all(torch.equal(before[key], cpu_before[key]) for key in before)
    difference = {key: abs(value - cpu_numbers[key]) / abs(cpu_numbers[key]) for key, value in numbers.items()}
    record_property("losses apart", difference)
    assert max(value for key, value in difference.items() if key != "norm") <= LOSS and difference["norm"] <= GRADIENT

    whole = torch.stack([g.norm() for g in cpu_gradients.values()]).norm()
    failures = {}
    for key, expected in cpu_gradients.items():
        error = (gradients[key] - expected).norm()
        if not error <= GRADIENT * expected.norm() + SHARE * whole:
            failures[key] = (error / expected.norm()).item()
    assert failures == {}
    for ours, on_cpu in ((after, cpu_after), (ema, cpu_ema)):
        for key in before:
            moved = (cpu_after[key] - before[key]).norm()
            error = (ours[key] - on_cpu[key]).norm()
            # A float32 weight of size 1 cannot move by less than 6e-8.
            if not error <= WEIGHT * moved + 1e-6 * before[key].norm():
                failures[key] = (error / moved).item()
    assert failures == {}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_deterministic_steps_repeat_bit_for_bit(precision, make_step, device, on_cuda):
    """With train.deterministic: the losses of every step, and all weights."""
    from unite_fast.utils.device import use_numerics

    config = from_tree(Config, SMALL)
    config = replace(config, train=replace(config.train, precision=precision, deterministic=True))
    use_numerics(precision, True)
    runs = []
    for _ in range(2):
        step, batch, history = make_step(config, device), make_batch(config, on_cuda), []
        for _ in range(3):
            losses, norm = step(batch)
            history += [losses.total, norm]
        runs.append([*history, *(p.detach() for p in step.state.model.parameters())])
    assert len(runs[0]) > 20 and all(map(torch.equal, *runs))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_cuda_graph_computes_what_usual_steps_compute(
    precision, compiled, make_step, device, on_cuda, record_property
):
    """Every step has other images and random numbers, LPIPS's dropout among them."""
    if not on_cuda:
        pytest.skip("a CUDA graph needs a GPU; tests/training/test_cuda_graph.py emulates one")
    from unite_fast.utils.device import use_numerics

    use_numerics(precision, True)
    runs = []
    for graph in (False, True):
        config = from_tree(Config, SMALL)
        config = replace(config, train=replace(config.train, precision=precision, compile=compiled, cuda_graph=graph))
        step, batch = make_step(config, device), make_batch(config, on_cuda)
        losses = []
        for _ in range(SETTLED + 3):
            losses.append(step(batch)[0].total)
            batch = replace(batch, data=batch.data.roll(1, -1).pin_memory())
        runs.append(torch.stack(losses))
    record_property("bit for bit", torch.equal(*runs))
    assert (runs[0].diff() != 0).all()
    torch.testing.assert_close(*runs, rtol=GRADIENT, atol=0)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny_run, tmp_path, device, assert_same_run):
    """The whole trainer, in bfloat16, where a GPU's attention is not deterministic by default."""

    def config(folder, steps):
        settings = (
            f"train.steps={steps}",
            "train.checkpoint_every=4",
            "train.log_every=2",
            f"train.device={device.type}",
        )
        own = "train.precision=bfloat16", "train.deterministic=true", f"train.out={tmp_path / folder}"
        return load_config("digits", (*tiny_run, *settings, *own))

    assert train(config("whole", 8)).steps == 8
    assert train(config("halves", 4)).steps == 4
    assert train(config("halves", 8), resume=True).steps == 8
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


@pytest.fixture
def no_syncs(on_cuda):
    """Makes PyTorch raise where the host would wait for the GPU."""

    def switch(on: bool) -> None:
        if on_cuda:
            torch.cuda.set_sync_debug_mode("error" if on else "default")

    yield switch
    switch(False)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_an_ordinary_step_does_not_synchronize(policy, make_step, device, on_cuda, no_syncs):
    """With LPIPS, two micro-batches and bfloat16. The first two steps may: they compile and choose algorithms."""
    config = from_tree(Config, SMALL)
    config = replace(
        config, train=replace(config.train, precision="bfloat16"), optim=replace(config.optim, nonfinite=policy)
    )
    step, batch, averages = make_step(config, device), make_batch(config, on_cuda), Averages(device)
    for number in range(4):
        no_syncs(number > 1)
        averages.add(number, *step(batch))
        no_syncs(False)
    assert averages.take()["total"] > 0


def test_synchronizing_calls_raise(device, on_cuda, no_syncs):
    if not on_cuda:
        pytest.skip("a CPU does not synchronize")
    x = torch.ones(3, device=device)
    for synchronize in (torch.Tensor.cpu, torch.Tensor.nonzero, lambda x: bool(x[0])):
        no_syncs(True)
        with pytest.raises(RuntimeError, match="synchroniz"):
            synchronize(x)
        no_syncs(False)


def test_batches_are_pinned_and_copied_intact(tiny_run, tmp_path, device, on_cuda):
    """While the GPU is busy, later batches do not overwrite those still being copied."""
    own = f"train.device={device.type}", f"train.out={tmp_path / 'run'}", "data.workers=2"
    trainer = Trainer(load_config("digits", (*tiny_run, *own)), False)
    busy = torch.randn(2048, 2048, device=device) if on_cuda else torch.randn(64, 64)
    try:
        arrived = []
        for _ in range(20):
            batch = trainer.read()
            assert not on_cuda or (batch.data.is_pinned() and batch.labels.is_pinned())
            for _ in range(5):
                busy = busy @ busy / 1e3
            images, labels = (x.to(device, non_blocking=True) for x in (batch.data, batch.labels))
            arrived.append((batch.ids, images, labels))
            del batch
        for ids, images, labels in arrived:
            expected_images, expected_labels = trainer.source.read(ids)
            assert torch.equal(images.cpu(), expected_images) and torch.equal(labels.cpu(), expected_labels)
    finally:
        trainer.close()


def test_out_of_memory_is_one_line(command, tiny_run, tmp_path, device, on_cuda):
    # One matrix takes 275 GB; what is allocated before it is small.
    width = "model.encoder.width=262144"
    ended = command("train", *tiny_run, width, f"train.out={tmp_path / 'run'}", f"train.device={device.type}")
    ended.error("memory", "CUDA" if on_cuda else 4 * 262144**2, "train.micro_batch", "--batch")


@pytest.fixture
def two_processes(tmp_path, device):
    """Trains the tiny digits run in two processes on one device, and returns the rows of its metrics.

    A machine has one process per GPU, so each process pretends to be a machine of its own. NCCL refuses two processes
    on one GPU of one machine, and tells machines apart by NCCL_HOSTID.
    """

    def run(arguments: list[str], folder: str) -> list[dict]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        started = []
        for rank in range(2):
            ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
            nccl = {"NCCL_HOSTID": f"machine{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
            call = [
                sys.executable,
                "-m",
                "unite_fast",
                "train",
                "digits",
                *arguments,
                f"train.out={tmp_path / folder}",
            ]
            with (tmp_path / f"{folder}.{rank}.txt").open("w") as output:
                env = {**os.environ, **ranks, **place, **nccl}
                started.append(subprocess.Popen(call, env=env, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT))
        try:
            statuses = [process.wait(100) for process in started]
        finally:
            for process in started:
                process.kill()
        output_tail = "\n".join((tmp_path / f"{folder}.{rank}.txt").read_text()[-1500:] for rank in range(2))
        if statuses != [0, 0] and (refused := re.search(r".*(Duplicate GPU|ncclInvalidUsage).*", output_tail)):
            pytest.skip(f"NCCL refuses two processes on one GPU here: {refused[0][:200]}")
        assert statuses == [0, 0], output_tail
        return [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_on_one_gpu_match_one_process(strategy, two_processes, tiny_run, tmp_path, device):
    settings = "train.steps=4", "train.log_every=1", f"train.device={device.type}", "optim.muon_dtype=float32"
    arguments = [*tiny_run, *settings]
    rows = two_processes([*arguments, f"parallel.strategy={strategy}"], "two")
    train(load_config("digits", (*arguments, f"train.out={tmp_path / 'one'}")))
    alone = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(alone) == 4
    difference = [abs(a["total"] - b["total"]) / abs(b["total"]) for a, b in zip(rows, alone, strict=True)]
    # The tolerance for two processes on a CPU, too; see tests/training/test_parallelize.py.
    assert max(difference) <= 1e-5, difference
