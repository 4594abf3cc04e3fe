"""Ordinary steps: what does not wait for a device, and what all processes decide alike."""

import re
import threading
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.config import Config
from unite_fast.distributed.process_group import current_ranks
from unite_fast.errors import UserError
from unite_fast.kernels import native
from unite_fast.recipes import load_config
from unite_fast.training import train_step
from unite_fast.training.metrics import Averages
from unite_fast.training.trainer import Trainer, train
from unite_fast.utils.files import read_rows


@pytest.fixture
def config(tiny_run, tmp_path) -> Callable[..., Config]:
    def make(*overrides: str) -> Config:
        settings = ("train.steps=8", "train.checkpoint_every=4", "train.log_every=4", f"train.out={tmp_path / 'run'}")
        return load_config("digits", (*tiny_run, *settings, *overrides))

    return make


def _with_a_nan(config: Config) -> tuple[str, int]:
    """Trains; in step 5, one pixel of rank 1's images is not a number."""
    make, close, skipped = train_step.make_micro_batch, Trainer.close, []

    def spoilt(images, labels, philox, config):
        batch = make(images, labels, philox, config)
        if philox.step == 4 and current_ranks().rank == 1:
            batch.images[0, 0, 0, 0] = float("nan")
        return batch

    def counted(self):
        skipped.append(int(self.state.skipped_steps))
        close(self)

    train_step.make_micro_batch, Trainer.close = spoilt, counted
    try:
        end = f"finished at step {train(config).steps}"
    except UserError as error:
        end = str(error)
    return end, *skipped


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_nan_of_one_rank_is_skipped_by_all(ranks, config, strategy):
    config = config("optim.nonfinite=skip", f"parallel.strategy={strategy}")
    assert ranks(2, _with_a_nan, config) == [("finished at step 8", 1)] * 2
    saved = load_checkpoint(config.train.out)
    assert saved.step == 8 and all(tensor.isfinite().all() for tensor in saved.tensors.values())
    assert saved.progress["skipped_steps"] == 1
    # A run that goes on from there has not forgotten it.
    config.train.steps = 12
    folder = train(config, resume=True).folder
    assert [(row["step"], row["skipped_steps"]) for row in read_rows(folder / "metrics.jsonl")][1:] == [(8, 1), (12, 1)]


def test_a_nan_of_one_rank_stops_all_with_the_step(ranks, config, mentions):
    config = config("parallel.strategy=ddp")
    for end, skipped in ranks(2, _with_a_nan, config):
        assert re.search(mentions("step 5", f"{config.train.out}/checkpoints/step_00000004"), end) and skipped == 0


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


def _steps_without_waiting(config: Config) -> int:
    """Checks what `run` does between two logs, reading images apart: those lie in the host's memory."""

    def guarded(method: Callable) -> Callable:
        def run(*arguments):
            with NoWaiting(), pytest.MonkeyPatch.context() as patch:
                for name in ("tolist", "numpy", "cpu"):  # of tensors on a CPU, these are no operators
                    patch.setattr(torch.Tensor, name, refusing(getattr(torch.Tensor, name)))
                return method(*arguments)

        return run

    def refusing(method: Callable) -> Callable:
        def run(*arguments):
            # The thread that writes a checkpoint may ask.
            assert threading.current_thread() is not threading.main_thread(), "the host asks for values"
            return method(*arguments)

        return run

    native.available = lambda: False  # C++ reaches into the memory of a CPU's tensors
    Trainer.step, Averages.add = guarded(Trainer.step), guarded(Averages.add)
    Trainer.save_pictures = lambda self: None
    return train(config).steps


@pytest.mark.parametrize(("world", "policy"), [(1, "stop"), (2, "skip")])
def test_an_ordinary_step_does_not_wait_for_the_device(ranks, config, world, policy):
    config = config("kernels=reference", "train.steps=4", "train.micro_batch=2", f"optim.nonfinite={policy}")
    assert ranks(world, _steps_without_waiting, config) == [4] * world


def test_what_would_wait_is_found():
    for waits in (torch.Tensor.item, torch.Tensor.nonzero, bool, lambda x: x[x > 0]):
        with pytest.raises(AssertionError, match="waits"), NoWaiting():
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
