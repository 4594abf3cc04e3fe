"""Ordinary steps: what does not wait for a device, and what all processes decide alike."""

import re
from collections.abc import Callable

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.config import Config
from unite_fast.distributed.launch import join_training
from unite_fast.distributed.process_group import current_ranks
from unite_fast.errors import UserError
from unite_fast.kernels import native
from unite_fast.recipes import load_config
from unite_fast.training import train_step
from unite_fast.training.trainer import Trainer, train
from unite_fast.utils.files import read_rows


@pytest.fixture
def config(tiny_run, tmp_path) -> Callable[..., Config]:
    def make(*overrides: str) -> Config:
        settings = ("train.steps=8", "train.checkpoint_every=4", "train.log_every=4", f"train.out={tmp_path / 'run'}")
        return load_config("digits", (*tiny_run, *settings, *overrides))

    return make


def _with_a_nan(config: Config) -> str:
    """Trains; in step 5, one pixel of rank 1's images is not a number, which no uint8 image could say."""
    make = train_step.make_micro_batch

    def spoilt(images, labels, philox, config):
        batch = make(images, labels, philox, config)
        if philox.step == 4 and current_ranks().rank == 1:
            batch.images[0, 0, 0, 0] = float("nan")
        return batch

    train_step.make_micro_batch = spoilt
    try:
        return f"finished at step {train(config).steps}"
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_nan_of_one_rank_is_skipped_by_all(ranks, config, strategy):
    config = config("optim.nonfinite=skip", f"parallel.strategy={strategy}")
    assert ranks(2, _with_a_nan, config) == ["finished at step 8"] * 2
    saved = load_checkpoint(config.train.out)
    assert saved.step == 8 and all(tensor.isfinite().all() for tensor in saved.tensors.values())
    assert saved.progress["skipped_steps"] == 1
    # A run that goes on from there has not forgotten it.
    config.train.steps = 12
    folder = train(config, resume=True).folder
    assert [(row["step"], row["skipped_steps"]) for row in read_rows(folder / "metrics.jsonl")][1:] == [(8, 1), (12, 1)]


def test_a_nan_of_one_rank_stops_all_with_the_step(ranks, config, mentions):
    config = config("parallel.strategy=ddp")
    for end in ranks(2, _with_a_nan, config):
        assert re.search(mentions("step 5", f"{config.train.out}/checkpoints/step_00000004"), end)


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for a device, were the tensors on one."""

    NEED_VALUES = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.nonzero.default,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert func not in self.NEED_VALUES and not by_mask, f"{func} waits for the device"
        return func(*args, **kwargs or {})


class NoAsking(TorchFunctionMode):
    """The same for what is no operator where tensors are on a CPU."""

    NEED_VALUES = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in self.NEED_VALUES, f"{func} waits for the device"
        return func(*args, **kwargs or {})


def _steps_without_waiting(config: Config) -> int:
    """Steps and their means, without reading images: those lie in the host's memory."""
    native.available = lambda: False  # C++ reaches into the memory of a CPU's tensors
    with join_training("cpu", 60) as (ranks, device):
        trainer = Trainer(config, False, ranks, device)
        try:
            for step in range(config.train.steps):
                batch = next(trainer.loader)
                with NoWaiting(), NoAsking():
                    trainer.averages.add(step, *trainer.step(batch))
        finally:
            trainer.close()
        return trainer.state.step


@pytest.mark.parametrize(("world", "policy"), [(1, "stop"), (2, "skip")])
def test_an_ordinary_step_does_not_wait_for_the_device(ranks, config, world, policy):
    config = config("kernels=reference", "train.steps=4", "train.micro_batch=2", f"optim.nonfinite={policy}")
    assert ranks(world, _steps_without_waiting, config) == [4] * world


def test_what_would_wait_is_found():
    operators = (torch.Tensor.item, torch.Tensor.nonzero, bool, lambda x: x[x > 0])
    for waits in (*operators, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
        with pytest.raises(AssertionError, match="waits"), NoWaiting(), NoAsking():
            waits(torch.ones(1))


@pytest.mark.gpu
def test_an_ordinary_step_does_not_wait_for_the_gpu(config):
    trainer = Trainer(config("train.device=cuda"), False)
    try:
        for step in range(4):
            batch = next(trainer.loader)
            # The first steps compile and choose algorithms.
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
            trainer.averages.add(step, *trainer.step(batch))
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.close()
