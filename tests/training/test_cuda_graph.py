"""A CUDA graph of the passes, without a GPU: an emulation records PyTorch's operators and replays them on the same
tensors. tests/gpu/test_training.py has the same comparison on a GPU."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unite_fast import lpips as lpips_module
from unite_fast.config import Config
from unite_fast.data_pipeline import Batch
from unite_fast.distributed.dtensor import local
from unite_fast.distributed.strategy import UNSHARDED
from unite_fast.errors import UserError
from unite_fast.kernels import native
from unite_fast.lpips import LINEAR_SHAPES, LPIPS
from unite_fast.recipes import load_config
from unite_fast.training import cuda_graph, train_step, trainer
from unite_fast.training.cuda_graph import SETTLED, WARMUP, relative_difference
from unite_fast.training.run_folder import FREE_ON_RESUME
from unite_fast.training.step_timer import StepClock
from unite_fast.training.train_state import TrainState
from unite_fast.training.train_step import TrainStep
from unite_fast.utils.rows import read_rows

STEPS = WARMUP + 5


def tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class OperatorRecorder(TorchDispatchMode):
    """Stands for `cuda_graph.Recorder` on a CPU. Numbers that Python computes are the same in every replay, as in a
    CUDA graph. A capture may neither wait for the device nor write to memory that it did not allocate."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.calls: list[tuple] = []
        self.own: set[int] = set()

    def run(self, function):
        return function()

    def capture(self, function):
        with self:
            result = function()
        for tensor in self.outputs():  # a capture computes nothing
            tensor.detach().fill_(0 if tensor.dtype in (torch.bool, torch.int64) else 77)
        return result

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        named = named or {}
        assert operator is not torch.ops.aten._local_scalar_dense.default, "a capture cannot wait for the device"
        inputs = tensors((arguments, named))
        result = operator(*arguments, **named)
        if operator._schema.is_mutable:
            changed = [
                tensor
                for value, argument in zip(arguments, operator._schema.arguments, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
                for tensor in tensors(value)
            ]
            assert all(storage(tensor) in self.own for tensor in changed), f"{operator} writes to other memory"
        before = {storage(tensor) for tensor in inputs}
        new = [tensor for tensor in tensors(result) if storage(tensor) not in before]
        self.own |= {storage(tensor) for tensor in new}
        # The inputs are kept, so that no other tensor gets their memory.
        self.calls.append((operator, arguments, named, tensors(result), inputs))
        return result

    def outputs(self) -> list[Tensor]:
        return [tensor for *_, outputs, _ in self.calls for tensor in outputs if storage(tensor) in self.own]

    @torch.no_grad()
    def replay(self) -> None:
        for operator, arguments, named, outputs, inputs in self.calls:
            results = tensors(operator(*arguments, **named))
            if operator._schema.is_mutable or "empty" in operator._schema.name:
                continue
            before = {storage(tensor) for tensor in inputs}
            for output, result in zip(outputs, results, strict=True):
                if storage(output) not in before:
                    output.copy_(result)


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    monkeypatch.setattr(cuda_graph, "Recorder", OperatorRecorder)
    # C++ draws random numbers without an operator of PyTorch, which the emulation would not see.
    monkeypatch.setattr(native, "available", lambda: False)


@pytest.fixture(scope="module")
def thin_lpips():
    """LPIPS with the layers of VGG16 and 32 channels."""
    blocks = [[(index, min(inputs, 32), 32) for index, inputs, _ in block] for block in lpips_module.VGG_BLOCKS]
    generator = torch.Generator().manual_seed(3)
    vgg = {}
    for index, inputs, outputs in (layer for block in blocks for layer in block):
        vgg[f"features.{index}.weight"] = 0.1 * torch.randn(outputs, inputs, 3, 3, generator=generator)
        vgg[f"features.{index}.bias"] = torch.zeros(outputs)
    with mock.patch.multiple(lpips_module, VGG_BLOCKS=blocks, _TAP_CHANNELS=(32,) * len(blocks)):
        yield LPIPS(vgg, {name: torch.ones(1, 32, 1, 1) for name in LINEAR_SHAPES}, "unit")


def with_settings(config: Config, graph: bool, precision="float32", micro_batch=0, lpips=0.0) -> Config:
    settings = {"cuda_graph": graph, "precision": precision, "micro_batch": micro_batch}
    model = replace(config.model, image_size=32, patch_size=16, latent_tokens=4) if lpips else config.model
    return replace(
        config,
        model=model,
        train=replace(config.train, **settings),
        perceptual=replace(config.perceptual, weight=lpips),
    )


def make_step(config: Config, make_model, lpips: LPIPS | None = None) -> TrainStep:
    return TrainStep(
        TrainState(make_model(config.model), config),
        config,
        micro_batch=config.train.micro_batch,
        lpips=lpips if config.perceptual.weight else None,
    )


def batches(config: Config, count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    b, side = config.train.batch_size, config.model.image_size
    return [
        Batch(
            torch.randint(256, (b, 3, side, side), generator=generator, dtype=torch.uint8),
            torch.randint(config.model.num_classes, (b,), generator=generator),
            torch.arange(b),
        )
        for _ in range(count)
    ]


def run(step: TrainStep, config: Config, count: int = STEPS) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and gradient norms of some steps, and the state after them."""
    rows = []
    for batch in batches(config, count):
        losses, norm = step(batch)
        rows.append(torch.stack([losses.total, losses.l1, losses.flow, losses.lpips, norm]))
    return rows, step.state.tensors()


@pytest.mark.parametrize("micro_batch", [0, 2])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_replay_computes_what_a_usual_step_computes(tiny_config, make_model, precision, micro_batch):
    results = {}
    for graph in (False, True):
        config = with_settings(tiny_config, graph, precision, micro_batch)
        results[graph] = run(make_step(config, make_model), config)
    (rows, state), (usual_rows, usual_state) = results[True], results[False]
    assert torch.equal(torch.stack(rows), torch.stack(usual_rows))
    assert len({row[0].item() for row in rows}) == STEPS  # every step has other images and random numbers
    for name, tensor in usual_state.items():
        assert torch.equal(state[name], tensor), name


def test_dropout_of_lpips_changes_from_replay_to_replay(tiny_config, make_model, thin_lpips):
    results = {}
    for graph in (False, True):
        config = with_settings(tiny_config, graph, lpips=0.5)
        step = make_step(config, make_model, thin_lpips)
        losses = []
        for batch in batches(config, 1) * STEPS:
            losses.append(step.accumulate(batch).lpips)
            step.state.model.zero_grad()
            step.state.step += 1
        results[graph] = torch.stack(losses)
    assert torch.equal(results[True], results[False])
    assert len(results[True].unique()) == STEPS


def test_a_replay_leaves_the_losses_of_earlier_steps(tiny_config, make_model):
    config = with_settings(tiny_config, True)
    losses = [losses.total for losses, _ in map(make_step(config, make_model), batches(config, STEPS))]
    assert len({float(loss) for loss in losses}) == STEPS


def test_earlier_gradients_are_refused(tiny_config, make_model):
    config = with_settings(tiny_config, True)
    step, (batch,) = make_step(config, make_model), batches(config, 1)
    step.accumulate(batch)
    with pytest.raises(ValueError, match="gradients"):
        step.accumulate(batch)


def baked(step: TrainStep):
    """`make_micro_batch` with the step number of Python instead of the positions'."""
    make = train_step.make_micro_batch

    def make_with_step(images, labels, philox, config):
        step_number = replace(philox, step=step.state.step, positions=philox.positions & 0xFFFFFFFF)
        return make(images, labels, step_number, config)

    return mock.patch.object(train_step, "make_micro_batch", make_with_step)


def test_a_number_of_the_host_in_the_graph_is_found(tiny_config, make_model):
    config = with_settings(tiny_config, True)
    step = make_step(config, make_model)
    every = batches(config, WARMUP + 2)
    with baked(step):
        for batch in every[:-1]:
            step(batch)
        with pytest.raises(UserError, match=r"train\.cuda_graph: .* differ by"):
            step(every[-1])


@pytest.mark.parametrize("image", [0, 3])
def test_an_input_that_is_not_copied_is_found(tiny_config, make_model, image):
    config = with_settings(tiny_config, True)
    step = make_step(config, make_model)
    kept = torch.zeros_like(batches(config, 1)[0].data)

    def passes(images, labels, positions):
        if (
            isinstance(cuda_graph_recorder, OperatorRecorder)
            and torch.utils._python_dispatch._get_current_dispatch_mode()
        ):
            images = kept  # what a capture would read
        return step.run_passes(images, labels, positions)

    cuda_graph_recorder = step.passes.recorder
    step.passes.passes = passes
    every = batches(config, WARMUP + 2)
    for batch in every[:-1]:
        step(batch)
    with pytest.raises(UserError, match=r"train\.cuda_graph: "):
        step(every[-1])


def test_a_difference_is_relative_and_not_finite_on_one_side_is_infinite():
    x, nan = torch.tensor([3.0, 4.0]), torch.tensor([float("nan"), 1.0])
    for pairs, expected in (
        ([(x, x)], 0),
        ([(1.5 * x, x), (x, x)], 0.5 / 2**0.5),
        ([(nan, nan)], 0),
        ([(nan, x)], float("inf")),
        ([(x, nan)], float("inf")),
        ([(0 * x, 0 * x)], 0),
    ):
        assert relative_difference([(one, other.clone()) for one, other in pairs]) == pytest.approx(expected)


def test_a_capture_records_no_events():
    clock = StepClock(torch.device("cuda"))
    with mock.patch.object(torch.cuda, "Event") as event:
        with clock.paused(), clock.measure("forward"):
            pass
        assert not event.called and not clock.recorded
        with clock.measure("forward"):
            pass
        assert event.called and clock.recorded


def test_the_time_of_a_capture_is_not_that_of_a_pass(tiny_config, make_model):
    config = with_settings(tiny_config, True)
    step = make_step(config, make_model)
    *before, captured = batches(config, WARMUP + 1)
    for batch in before:
        step(batch)
    assert step.clock.take()[1]["forward"] > 0
    step(captured)
    _, parts = step.clock.take()
    assert parts["forward"] == 0 and parts["backward"] > 0


def test_what_cannot_be_captured_is_refused(tiny_config):
    config = with_settings(tiny_config, True)
    sharded = replace(UNSHARDED, name="fsdp", reshard=True)
    trainer.check_cuda_graph(config, torch.device("cuda"), UNSHARDED)
    trainer.check_cuda_graph(with_settings(tiny_config, False), torch.device("cpu"), sharded)
    with pytest.raises(UserError, match=r"train\.cuda_graph is true, but .* cpu"):
        trainer.check_cuda_graph(config, torch.device("cpu"), UNSHARDED)
    with pytest.raises(UserError, match=r"parallel\.reshard_after_forward=false"):
        trainer.check_cuda_graph(config, torch.device("cuda"), sharded)


def test_a_run_with_evaluations_and_a_resume(tiny_run, tmp_path, monkeypatch):
    """The same metrics and weights as without a graph, which is captured again after the resume."""
    monkeypatch.setattr(trainer, "check_cuda_graph", lambda *_: None)
    results = []
    for graph in ("false", "true"):
        every = ("train.log_every=1", "train.checkpoint_every=6", "train.evaluate_every=6", "evaluation.count=8")
        settings = (*tiny_run, *every, f"train.out={tmp_path / graph}", f"train.cuda_graph={graph}")
        trainer.train(load_config("digits", (*settings, "train.steps=7")))
        folder = trainer.train(load_config("digits", (*settings, "train.steps=14")), resume=True).folder
        keys = ("total", "l1", "flow", "grad_norm")
        rows = [[row[key] for key in keys] for row in read_rows(folder / "metrics.jsonl") if "total" in row]
        weights = [path.read_bytes() for path in sorted((folder / "checkpoints/step_00000014").glob("*.safetensors"))]
        results.append((rows, weights))
    assert len(results[0][0]) == 14 and results[0][1]
    assert results[0] == results[1]


class Rerun:
    """Stands for `cuda_graph.Recorder` on several ranks: a replay runs the passes again and copies their results to the
    captured ones, as a graph that contains FSDP's collectives."""

    passes: cuda_graph.GraphedPasses

    def run(self, function):
        return function()

    def capture(self, function):
        self.function, self.losses = function, function()
        return self.losses

    def replay(self):
        for parameter in self.passes.parameters:
            parameter.grad = None
        for old, new in zip(cuda_graph.values(self.losses), cuda_graph.values(self.function()), strict=True):
            old.copy_(new)
        for old, parameter in zip(self.passes.gradients, self.passes.parameters, strict=True):
            if old is not None:
                local(old).copy_(local(parameter.grad))
            parameter.grad = None


def _train_with_reruns(config: Config) -> list:
    recorder, initialize = Rerun(), cuda_graph.GraphedPasses.__init__

    def with_recorder(self, *arguments):
        initialize(self, *arguments)
        recorder.passes = self

    cuda_graph.Recorder = lambda device: recorder
    cuda_graph.GraphedPasses.__init__ = with_recorder
    trainer.check_cuda_graph = lambda *_: None
    folder = trainer.train(config).folder
    assert hasattr(recorder, "passes") == config.train.cuda_graph
    return [[row[key] for key in ("total", "l1", "flow", "grad_norm")] for row in read_rows(folder / "metrics.jsonl")]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_ranks(ranks, tiny_run, tmp_path, strategy):
    """Sharded gradients are set again after each replay."""
    results = []
    for graph in ("false", "true"):
        parallel = (f"parallel.strategy={strategy}", "parallel.reshard_after_forward=false", "train.micro_batch=2")
        settings = ("train.log_every=1", "train.steps=8", f"train.out={tmp_path / graph}", f"train.cuda_graph={graph}")
        rows, _ = ranks(2, _train_with_reruns, load_config("digits", (*tiny_run, *parallel, *settings)))
        results.append(rows)
    assert len(results[0]) == 8 and results[0] == results[1]


def test_a_gradient_that_one_side_lacks_is_found(tiny_config, make_model):
    config = with_settings(tiny_config, True)
    step = make_step(config, make_model)
    *before, last = batches(config, SETTLED)
    for batch in before:
        step(batch)
    step.passes.gradients[0] = None
    with pytest.raises(UserError, match=r"train\.cuda_graph: .* other parameters"):
        step(last)


def test_a_resumed_run_may_switch_it_on():
    assert "train.cuda_graph" in FREE_ON_RESUME
