"""Several processes train as one does: the same start, the same losses, a part of the memory."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from unite_fast.distributed.dtensor import copy_full, full_tensor, local
from unite_fast.distributed.launch import join_training
from unite_fast.model.unite import UNITE
from unite_fast.recipes import load_config
from unite_fast.sampling import sampler
from unite_fast.training import train_step
from unite_fast.training.parallelize import build_model, placement, state_bytes
from unite_fast.training.trainer import Trainer

TOLERANCE = 1e-5
"""Relative, of losses in float32: sums over the batch in another order. By --every-strategy: at most 5.3e-6."""


@pytest.fixture(scope="module")
def settings(tiny_run, tmp_path_factory):
    """The settings of a tiny run of batch 16, in a folder of its own.

    The flow loss has the recipe's small weight: with 1 it falls from 2 to 0.01 in these 20 steps, and one process in
    micro-batches is then 1.4e-5 from one without.
    """
    folder, numbers = tmp_path_factory.mktemp("runs"), itertools.count()

    def make(*overrides: str):
        common = ("train.batch_size=16", "optim.muon_dtype=float32", "data.flip=true", "objective.flow_weight=0.01")
        return load_config("digits", (*tiny_run, *common, f"train.out={folder / str(next(numbers))}", *overrides))

    return make


class Run:
    """A trainer of this process among others."""

    def __init__(self, config, resume: bool = False):
        self.group = join_training("cpu", 60)
        self.config, self.resume = config, resume

    def __enter__(self) -> Trainer:
        self.trainer = Trainer(self.config, self.resume, *self.group.__enter__())
        return self.trainer

    def __exit__(self, *error) -> None:
        self.trainer.close()
        self.group.__exit__(*error)


def take_steps(trainer: Trainer, count: int) -> list[list[float]]:
    """Total, L1 and flow loss and gradient norm of each step, as they are logged."""
    seen = []
    for step in range(count):
        trainer.averages.add(step, *trainer.step(next(trainer.loader)))
        means = trainer.averages.take()
        seen.append([means[name] for name in ("total", "l1", "flow", "grad_norm")])
    return seen


def track(config, count: int) -> list[list[float]]:
    with Run(config) as trainer:
        return take_steps(trainer, count)


@pytest.fixture(scope="module")
def batch(pytestconfig) -> str:
    """Of eight processes, only 32 images make four micro-batches each."""
    return f"train.batch_size={32 if pytestconfig.getoption('every_strategy') else 16}"


@pytest.fixture(scope="module")
def alone(settings, batch) -> torch.Tensor:
    """What one process sees in 20 steps."""
    return torch.tensor(track(settings(batch), 20), dtype=torch.float64)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A few of the ways to split the work, or with --every-strategy all of them, in one micro-batch and in four."""
    if metafunc.function is not test_losses_are_those_of_one_process:
        return
    ways = [(2, 1, "ddp", 2, 20), (4, 2, "hsdp", 1, 20), (8, 1, "fsdp", 0, 8)]
    if metafunc.config.getoption("every_strategy"):
        spread = [(1, 1, "auto"), *((world, 1, kind) for world in (2, 4, 8) for kind in ("ddp", "fsdp"))]
        spread += [(4, 2, "hsdp"), (8, 2, "hsdp")]
        ways = [(world, nodes, kind, 32 // world // parts, 20) for world, nodes, kind in spread for parts in (1, 4)]
    metafunc.parametrize(("world", "nodes", "strategy", "micro_batch", "steps"), ways)


def test_losses_are_those_of_one_process(world, nodes, strategy, micro_batch, steps, settings, batch, ranks, alone):
    config = settings(batch, f"parallel.strategy={strategy}", f"train.micro_batch={micro_batch}")
    seen = torch.tensor(ranks(world, track, config, steps, nodes=nodes), dtype=torch.float64)
    assert (seen == seen[0]).all()  # what is logged, clipped and decided is the same on all
    want = alone[:steps].clamp(min=torch.finfo(torch.float64).tiny)  # the first flow loss is 0
    difference = ((seen[0] - alone[:steps]).abs() / want)[:, :3].max(0).values.tolist()
    print("largest relative difference of total, L1 and flow:", *(f"{one:.1e}" for one in difference))
    assert max(difference) <= TOLERANCE
    assert alone[0, 1] > 1.1 * alone[-1, 1]  # it does learn


def start_values(config) -> dict[str, torch.Tensor]:
    with join_training("cpu", 60) as (ranks, device):
        model, _ = build_model(config, ranks, device)
        return {
            name: full_tensor(x.detach()).numpy() for name, x in (*model.named_parameters(), *model.named_buffers())
        }


@pytest.mark.parametrize(("world", "nodes", "strategy"), [(3, 1, "fsdp"), (4, 2, "hsdp")])
def test_start_values_do_not_depend_on_the_number_of_processes(world, nodes, strategy, settings, ranks):
    config = settings(f"parallel.strategy={strategy}", "seed=5")
    model = UNITE.create(config.model, 5)
    want = dict((*model.named_parameters(), *model.named_buffers()))
    for found in ranks(world, start_values, config, nodes=nodes):
        assert found.keys() == want.keys()
        assert [name for name, x in want.items() if not torch.equal(torch.from_numpy(found[name]), x)] == []


def held_bytes(config) -> dict[str, int]:
    """What this process holds of the training state after a backward pass, memory and not sizes."""
    with Run(config) as trainer:
        trainer.train_step.accumulate(next(trainer.loader))
        state = trainer.state
        kinds = {
            "parameters": state.parameters,
            "gradients": [p.grad for p in state.parameters],
            "averages": state.ema.averages.values(),
            "optimizers": [x for name, x in state.tensors().items() if name.startswith("optim.") and x.dim()],
        }
        found = {}
        for kind, tensors in kinds.items():
            storages = [local(tensor.detach()).untyped_storage() for tensor in tensors]
            found[kind] = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        return found


def test_bytes_of_a_process_fall_as_their_number_grows(settings, ranks):
    size = (
        "parallel.strategy=fsdp",
        "model.encoder.width=64",
        "model.encoder.heads=1",
        "model.decoder.width=64",
        "model.latent_channels=16",
    )
    config = settings(*size)
    model = UNITE(config.model)
    parameters = 4 * sum(p.numel() for p in model.parameters())
    one = held_bytes(config)
    assert sum(one.values()) == state_bytes(model)
    assert one["parameters"] == one["gradients"] == one["averages"] == parameters
    for world in (2, 4, 8):
        for found in ranks(world, held_bytes, settings(*size)):
            for kind, count in found.items():
                # The label table has 12 rows: 8 processes hold 2 or none.
                assert one[kind] / world * 0.97 <= count <= one[kind] / world * 1.03, (world, kind)


def test_no_process_of_ddp_holds_less_than_everything(settings, ranks):
    one = held_bytes(settings())
    assert ranks(2, held_bytes, settings("parallel.strategy=ddp")) == [one, one]


def bfloat16_step(config) -> tuple[list[float], set[torch.dtype], set[torch.dtype]]:
    """Losses of a step from weights that are far from their start, dtypes of the blocks' residuals and of what the
    optimizers see."""
    with Run(config) as trainer:
        state, residuals = trainer.state, set()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in state.parameters:
                copy_full(parameter, full_tensor(parameter) + 0.1 * torch.randn(parameter.shape, generator=generator))
        for block in state.model.encoder.blocks:
            block.register_forward_pre_hook(lambda _, inputs: residuals.add(inputs[0].dtype))
        seen = take_steps(trainer, 1)[0]
        trainer.train_step.accumulate(next(trainer.loader))
        return seen, residuals, {x.dtype for p in state.parameters for x in (p, p.grad)}


def test_in_bfloat16_the_forward_pass_is_that_of_one_process(settings, ranks):
    """Norms and what makes the residual stay float32: several processes are closer to one than bfloat16 to float32."""
    low = ("train.precision=bfloat16", "parallel.strategy=fsdp")
    exact, one = bfloat16_step(settings()), bfloat16_step(settings(*low))
    several = ranks(2, bfloat16_step, settings(*low))
    assert all(part[1:] == one[1:] == ({torch.float32}, {torch.float32}) for part in several)
    for truth, want, got in list(zip(exact[0], one[0], several[0][0], strict=True))[:3]:
        assert abs(want - truth) > 1e-5 * truth
        assert abs(got - want) <= 0.1 * abs(want - truth)


def draw_amid(config, pictures: bool) -> tuple[torch.Tensor, list[list[float]], torch.Tensor, dict]:
    """A sample drawn between two steps, and the steps."""
    with Run(config) as trainer:
        state = trainer.state
        seen = take_steps(trainer, 3)
        averages = {name: full_tensor(x).numpy() for name, x in state.ema.averages.items()}
        sample = None
        if pictures:
            with state.ema.applied():
                sample = sampler.sample_images(state.model, torch.arange(4), config.sampling, config.seed).numpy()
        return sample, seen + take_steps(trainer, 2), averages


def test_pictures_drawn_together_are_those_of_the_averages_and_change_nothing(settings, ranks):
    # Weights that stay gathered after a forward pass must not outlive the exchange with the averages. cfg_first calls
    # the encoder, not the model.
    common = ("parallel.strategy=fsdp", "parallel.reshard_after_forward=false", "sampling.order=cfg_first")
    config = settings(*common, "sampling.guidance=2")
    drawn = ranks(2, draw_amid, config, True)
    undisturbed = ranks(2, draw_amid, settings(*common), False)
    assert drawn[0][1] == undisturbed[0][1]
    plain = UNITE.create(config.model, 0)
    plain.load_state_dict({name: torch.from_numpy(x) for name, x in drawn[0][2].items()}, strict=False)
    want = sampler.sample_images(plain, torch.arange(4), config.sampling, config.seed)
    assert all(torch.equal(torch.from_numpy(sample), want) for sample, *_ in drawn)


def reductions(config) -> tuple[int, int]:
    """How many sums over the processes a step asks for, before its last flow losses and in all."""
    count, before, add_up, flow_losses = 0, 0, torch.distributed.all_reduce, train_step.flow_losses

    def counting(*arguments, **options):
        nonlocal count
        count += 1
        return add_up(*arguments, **options)

    def noting(*arguments):
        nonlocal before
        before = count
        return flow_losses(*arguments)

    with Run(config) as trainer:
        torch.distributed.all_reduce, train_step.flow_losses = counting, noting
        take_steps(trainer, 1)
        return before, count


def test_gradients_are_added_up_once_a_step_whatever_the_micro_batches(settings, ranks):
    model = settings().model
    # A group for each block and layer, for the norms of each of both, for the adaLN Linears, encoder, decoder and the
    # model; and the losses.
    sums = model.encoder.depth + model.decoder.depth + 2 + 4 + 1
    # The decoder's are complete before the flow begins: its layers, their norms, and what is around them.
    decoder = model.decoder.depth + 2
    for micro_batch in (0, 2):
        config = settings("parallel.strategy=ddp", f"train.micro_batch={micro_batch}")
        assert ranks(2, reductions, config) == [(decoder, sums)] * 2


def skip_one(config) -> tuple[list[str], int, bool]:
    """A step whose gradients are not finite on one process alone: what it changed, the count, and how it goes on."""
    with Run(config) as trainer:
        state = trainer.state
        take_steps(trainer, 2)
        before = {name: local(x).clone() for name, x in state.tensors().items()}
        trainer.train_step.accumulate(next(trainer.loader))
        if trainer.ranks.main:
            local(state.parameters[0].grad)[0] = float("nan")
        state.apply_gradients()
        changed = [name for name, x in state.tensors().items() if not torch.equal(local(x), before[name])]
        skipped = int(state.skipped_steps)
        finite = torch.tensor(take_steps(trainer, 1)).isfinite().all()
        return changed, skipped, bool(finite) and int(state.skipped_steps) == skipped


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_of_bad_gradients_is_skipped_on_all_processes(world, settings, ranks):
    config = settings("optim.nonfinite=skip", "parallel.strategy=fsdp")
    assert ranks(world, skip_one, config) == [([], 1, True)] * world


GB = 10**9


def test_the_state_of_b_takes_three_and_a_half_gigabytes():
    with torch.device("meta"):
        model = UNITE(load_config("imagenet256_b", ("perceptual.weight=0",)).model)
    assert round(state_bytes(model) / GB, 1) == 3.5


def test_a_parameter_too_short_to_cut_is_cut_along_another_dimension():
    place = placement(4)
    assert place(torch.empty(12, 7)) is None  # along the first
    assert place(torch.empty(1, 16, 6)).dim == 1
    assert place(torch.empty(1, 3, 8)).dim == 2
    assert place(torch.empty(3)) is None  # with nothing on the last process


def train_and_save(config) -> int:
    from unite_fast.training.trainer import train

    return train(config).steps


def test_a_whole_run_leaves_what_one_process_would(settings, ranks, capfd, trained_folder, mentions):
    often = ("train.steps=4", "train.log_every=2", "train.checkpoint_every=2")
    config = settings(*often, "train.precision=bfloat16", "parallel.strategy=auto")
    assert ranks(2, train_and_save, config) == [4, 4]
    out = capfd.readouterr().out
    assert re.search(mentions(2, 8, "ddp"), out)
    assert out.count("run folder") == 1
    left = {path.name for path in Path(config.train.out).iterdir()}
    assert left == {path.name for path in trained_folder.iterdir()}


def save_and_go_on(config) -> list[list[float]]:
    with Run(config) as trainer:
        take_steps(trainer, 3)
        trainer.save()
        trainer.checkpoints.wait()
        return take_steps(trainer, 5)


def go_on(config) -> list[list[float]]:
    with Run(config, resume=True) as trainer:
        assert trainer.state.step == 3
        return take_steps(trainer, 5)


@pytest.mark.parametrize("saved_by", ["fsdp", "ddp"])
def test_a_checkpoint_resumes_on_any_world_size(saved_by, settings, ranks):
    config = settings(f"parallel.strategy={saved_by}")
    want = torch.tensor(ranks(4, save_and_go_on, config)[0], dtype=torch.float64)
    again = f"train.out={config.train.out}"
    for world, nodes, strategy in ((1, 1, "auto"), (2, 1, "ddp"), (4, 2, "hsdp"), (8, 1, "fsdp")):
        found = ranks(world, go_on, settings(again, f"parallel.strategy={strategy}"), nodes=nodes)
        for losses in found:
            difference = (torch.tensor(losses, dtype=torch.float64) - want).abs()
            assert (difference <= TOLERANCE * want)[:, :3].all(), (world, strategy)
