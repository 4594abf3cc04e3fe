"""A step never waits for the device, and all ranks handle a NaN alike."""

import json
import re
from collections.abc import Callable
from pathlib import Path

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
from unite_fast.training.run_folder import read_status
from unite_fast.training.trainer import Trainer, train
from unite_fast.utils.rows import read_rows


@pytest.fixture
def config(tiny_run, tmp_path) -> Callable[..., Config]:
    def make(*overrides: str) -> Config:
        settings = ("train.steps=8", "train.checkpoint_every=4", "train.log_every=4", f"train.out={tmp_path / 'run'}")
        return load_config("digits", (*tiny_run, *settings, *overrides))

    return make


def _train_with_a_nan(config: Config) -> str:
    """Train with a NaN pixel on rank 1 in step 5, set after the conversion from uint8. Returns how the run ended."""
    make = train_step.make_micro_batch

    def make_with_nan(images, labels, philox, config):
        batch = make(images, labels, philox, config)
        if philox.positions[0] >> 32 == 4 and current_ranks().rank == 1:
            batch.data[0, 0, 0, 0] = float("nan")
        return batch

    train_step.make_micro_batch = make_with_nan
    try:
        return f"finished at step {train(config).steps}"
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_nan_on_one_rank_skips_the_step_on_all(ranks, config, strategy):
    config = config("optim.nonfinite=skip", f"parallel.strategy={strategy}")
    assert ranks(2, _train_with_a_nan, config) == ["finished at step 8"] * 2
    saved = load_checkpoint(config.train.out)
    assert saved.step == 8 and all(tensor.isfinite().all() for tensor in saved.tensors.values())
    assert saved.progress["skipped_steps"] == 1
    # The count survives a resume.
    config.train.steps = 12
    folder = train(config, resume=True).folder
    assert [(row["step"], row["skipped_steps"]) for row in read_rows(folder / "metrics.jsonl")][1:] == [(8, 1), (12, 1)]


def test_a_run_that_only_skips_steps_ends(config, monkeypatch, mentions):
    config = config("optim.nonfinite=skip", "train.steps=220", "train.checkpoint_every=250", "train.log_every=2")
    make = train_step.make_micro_batch

    def make_with_nan(images, labels, philox, config):
        batch = make(images, labels, philox, config)
        step = (philox.positions[0] >> 32) + 1
        # 99 steps in a row are too few to end it.
        if 4 <= step <= 102 or step >= 105:
            batch.data[0, 0, 0, 0] = float("nan")
        return batch

    monkeypatch.setattr(train_step, "make_micro_batch", make_with_nan)
    with pytest.raises(UserError, match=mentions(100, "optim.nonfinite=skip", "schedule.lr")):
        train(config)
    folder = Path(config.train.out)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # called for NaN, which is no JSON
    assert (rows[-1]["step"], rows[-1]["skipped_steps"]) == (202, 197)
    assert ["total" in row for row in rows] == [row["step"] in (1, 2, 4, 104) for row in rows]
    assert "finished" not in read_status(folder)


def test_a_nan_on_one_rank_stops_all_and_names_the_step(ranks, config, mentions):
    config = config("parallel.strategy=ddp")
    for end in ranks(2, _train_with_a_nan, config):
        assert re.search(mentions("step 5", f"{config.train.out}/checkpoints/step_00000004"), end)


class NoWaitingOperators(TorchDispatchMode):
    """Fails on operators that make the host wait for the device when their tensors are on one."""

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


class NoWaitingMethods(TorchFunctionMode):
    """The same for methods that are not dispatched as operators for CPU tensors."""

    NEED_VALUES = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in self.NEED_VALUES, f"{func} waits for the device"
        return func(*args, **kwargs or {})


def _guarded_steps(config: Config) -> int:
    """Take steps and add to the means under these guards. Reading images is left out: those are in host memory."""
    native.available = lambda: False  # C++ kernels read the memory of CPU tensors
    with join_training("cpu", 60) as (ranks, device, _):
        trainer = Trainer(config, False, ranks, device)
        try:
            for step in range(config.train.steps):
                batch = next(trainer.loader)
                with NoWaitingOperators(), NoWaitingMethods():
                    trainer.averages.add(step, *trainer.step(batch))
        finally:
            trainer.close()
        return trainer.state.step


@pytest.mark.parametrize(("world", "policy"), [(1, "stop"), (2, "skip")])
def test_a_step_does_not_wait_for_the_device(ranks, config, world, policy):
    config = config("kernels=reference", "train.steps=4", "train.micro_batch=2", f"optim.nonfinite={policy}")
    assert ranks(world, _guarded_steps, config) == [4] * world


def test_the_guards_catch_operations_that_wait():
    operators = (torch.Tensor.item, torch.Tensor.nonzero, bool, lambda x: x[x > 0])
    for operation in (*operators, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
        with pytest.raises(AssertionError, match="waits"), NoWaitingOperators(), NoWaitingMethods():
            operation(torch.ones(1))


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu(config):
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
