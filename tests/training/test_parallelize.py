"""Training on several ranks: initial weights and losses of a single process, and a share of the memory each."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from unite_fast.distributed.dtensor import copy_full, full_tensor, local
from unite_fast.distributed.launch import join_training
from unite_fast.kernels import backend
from unite_fast.model.unite import UNITE
from unite_fast.recipes import load_config
from unite_fast.sampling import sampler
from unite_fast.training import train_step
from unite_fast.training.parallelize import build_model, placement, state_bytes
from unite_fast.training.trainer import Trainer

TOLERANCE = 1e-5
"""Relative error of float32 losses, summed over the batch in another order. --every-strategy: at most 5.3e-6."""


@pytest.fixture(scope="module")
def settings(tiny_run, tmp_path_factory):
    """Makes configs of tiny runs with batch 16, each in a folder of its own.

    The flow loss has the recipe's small weight. At weight 1 it falls from 2 to 0.01 in these 20 steps, and then
    micro-batches alone change the losses of a single process by 1.4e-5.
    """
    folder, numbers = tmp_path_factory.mktemp("runs"), itertools.count()

    def make(*overrides: str):
        common = ("train.batch_size=16", "optim.muon_dtype=float32", "data.flip=true", "objective.flow_weight=0.01")
        return load_config("digits", (*tiny_run, *common, f"train.out={folder / str(next(numbers))}", *overrides))

    return make


class Run:
    """Joins the group of ranks and gives this rank's trainer."""

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
    """Logged total, L1 and flow loss and gradient norm of each step."""
    rows = []
    for step in range(count):
        trainer.averages.add(step, *trainer.step(next(trainer.loader)))
        means = trainer.averages.take()
        rows.append([means[name] for name in ("total", "l1", "flow", "grad_norm")])
    return rows


def run_steps(config, count: int) -> list[list[float]]:
    with Run(config) as trainer:
        return take_steps(trainer, count)


@pytest.fixture(scope="module")
def batch(pytestconfig) -> str:
    """32 images where eight ranks run four micro-batches each, else 16."""
    return f"train.batch_size={32 if pytestconfig.getoption('every_strategy') else 16}"


@pytest.fixture(scope="module")
def single_process(settings, batch) -> torch.Tensor:
    """Losses and gradient norms of 20 steps in a single process."""
    return torch.tensor(run_steps(settings(batch), 20), dtype=torch.float64)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A few strategies, or with --every-strategy all of them, with one and with four micro-batches."""
    if metafunc.function is not test_losses_match_a_single_process:
        return
    cases = [(2, 1, "ddp", 2, 20), (4, 2, "hsdp", 1, 20), (8, 1, "fsdp", 0, 8)]
    if metafunc.config.getoption("every_strategy"):
        layouts = [(1, 1, "auto"), *((world, 1, kind) for world in (2, 4, 8) for kind in ("ddp", "fsdp"))]
        layouts += [(4, 2, "hsdp"), (8, 2, "hsdp")]
        cases = [(world, nodes, kind, 32 // world // n, 20) for world, nodes, kind in layouts for n in (1, 4)]
    metafunc.parametrize(("world", "nodes", "strategy", "micro_batch", "steps"), cases)


def test_losses_match_a_single_process(
    world, nodes, strategy, micro_batch, steps, settings, batch, ranks, single_process
):
    config = settings(batch, f"parallel.strategy={strategy}", f"train.micro_batch={micro_batch}")
    rows = torch.tensor(ranks(world, run_steps, config, steps, nodes=nodes), dtype=torch.float64)
    assert (rows == rows[0]).all()  # all ranks log and clip alike
    expected = single_process[:steps].clamp(min=torch.finfo(torch.float64).tiny)  # the first flow loss is 0
    difference = ((rows[0] - single_process[:steps]).abs() / expected)[:, :3].max(0).values.tolist()
    print("largest relative difference of total, L1 and flow:", *(f"{one:.1e}" for one in difference))
    assert max(difference) <= TOLERANCE
    assert single_process[0, 1] > 1.1 * single_process[-1, 1]  # the model learns


def initial_weights(config) -> dict[str, torch.Tensor]:
    with join_training("cpu", 60) as (ranks, device, _):
        model, _ = build_model(config, ranks, device)
        return {
            name: full_tensor(x.detach()).numpy() for name, x in (*model.named_parameters(), *model.named_buffers())
        }


@pytest.mark.parametrize(("world", "nodes", "strategy"), [(3, 1, "fsdp"), (4, 2, "hsdp")])
def test_initial_weights_do_not_depend_on_the_world_size(world, nodes, strategy, settings, ranks):
    config = settings(f"parallel.strategy={strategy}", "seed=5")
    model = UNITE.create(config.model, 5)
    expected = dict((*model.named_parameters(), *model.named_buffers()))
    for values in ranks(world, initial_weights, config, nodes=nodes):
        assert values.keys() == expected.keys()
        assert [name for name, x in expected.items() if not torch.equal(torch.from_numpy(values[name]), x)] == []


def gradients(config) -> dict[str, torch.Tensor]:
    """Gradients of the first step, reduced over the ranks."""
    with Run(config) as trainer:
        trainer.train_step.accumulate(next(trainer.loader))
        named = dict(trainer.state.model.named_parameters())
        assert [name for name, p in named.items() if p.grad is None] == []
        return {name: full_tensor(p.grad).float().numpy() for name, p in named.items()}


@pytest.mark.skipif(bool(backend.why_missing("triton")), reason=backend.why_missing("triton") or "here")
@pytest.mark.skipif(not backend.interpreted(), reason="the ranks of this test are on the CPU")
def test_gradients_of_biases_that_ops_share_reach_their_shards(settings, ranks):
    """With the Triton backend, an op of the next layer makes the gradient of a bias after FSDP has freed it."""
    common = "kernels=triton", "train.precision=bfloat16", "train.batch_size=4", "objective.flow_weight=1"
    with backend.using("auto"):  # the trainer sets the backend of the process
        expected = gradients(settings(*common))
    for values in ranks(2, gradients, settings(*common, "parallel.strategy=fsdp")):
        assert values.keys() == expected.keys()
        for name, value in values.items():
            error, size = (torch.from_numpy(x).norm() for x in (value - expected[name], expected[name]))
            # Each rank rounds its gradients to bfloat16 before they are added.
            assert error <= 2.0**-8 * size, (name, error / size)


def allocated_bytes(config) -> dict[str, int]:
    """Bytes that this rank allocates for each part of the training state, after a backward pass."""
    with Run(config) as trainer:
        trainer.train_step.accumulate(next(trainer.loader))
        state = trainer.state
        kinds = {
            "parameters": state.parameters,
            "gradients": [p.grad for p in state.parameters],
            "averages": state.ema.averages.values(),
            "optimizers": [x for name, x in state.tensors().items() if name.startswith("optim.") and x.dim()],
        }
        allocated = {}
        for kind, tensors in kinds.items():
            storages = [local(tensor.detach()).untyped_storage() for tensor in tensors]
            allocated[kind] = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        return allocated


def test_fsdp_divides_the_training_state_by_the_world_size(settings, ranks):
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
    one = allocated_bytes(config)
    assert sum(one.values()) == state_bytes(model)
    assert one["parameters"] == one["gradients"] == one["averages"] == parameters
    for world in (2, 4, 8):
        for allocated in ranks(world, allocated_bytes, settings(*size)):
            for kind, count in allocated.items():
                # The label table has 12 rows: each of 8 ranks has 2 or none.
                assert one[kind] / world * 0.97 <= count <= one[kind] / world * 1.03, (world, kind)


def test_ddp_keeps_the_whole_training_state_on_every_rank(settings, ranks):
    one = allocated_bytes(settings())
    assert ranks(2, allocated_bytes, settings("parallel.strategy=ddp")) == [one, one]


def rounded_step(config) -> tuple[list[float], set[torch.dtype], set[torch.dtype]]:
    """One step from perturbed weights: losses, dtypes of the residual stream, dtypes of weights and gradients in the
    optimizers."""
    with Run(config) as trainer:
        state, residuals = trainer.state, set()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in state.parameters:
                copy_full(parameter, full_tensor(parameter) + 0.1 * torch.randn(parameter.shape, generator=generator))
        for block in state.model.encoder.blocks:
            block.register_forward_pre_hook(lambda _, inputs: residuals.add(inputs[0].dtype))
        losses = take_steps(trainer, 1)[0]
        trainer.train_step.accumulate(next(trainer.loader))
        return losses, residuals, {x.dtype for p in state.parameters for x in (p, p.grad)}


@pytest.mark.parametrize("precision", ["bfloat16", "float8"])
def test_rounded_losses_match_a_single_process(precision, settings, ranks):
    """Norms and the residual stream stay float32 when sharded, so losses differ far less than bfloat16 from float32.
    float8 rounds gathered weights, which are bfloat16, and a single process its bfloat16 copies."""
    changed = (f"train.precision={precision}", "parallel.strategy=fsdp")
    exact, single = rounded_step(settings()), rounded_step(settings(*changed))
    sharded = ranks(2, rounded_step, settings(*changed))
    assert all(rank[1:] == single[1:] == ({torch.float32}, {torch.float32}) for rank in sharded)
    for truth, expected, actual in list(zip(exact[0], single[0], sharded[0][0], strict=True))[:3]:
        assert abs(expected - truth) > 1e-5 * truth
        assert abs(actual - expected) <= 0.1 * abs(expected - truth)


def sample_between_steps(config, draw: bool) -> tuple[torch.Tensor, list[list[float]], torch.Tensor, dict]:
    """Five steps, with a sample drawn after the third: the sample, the losses, and the averages it was drawn with."""
    with Run(config) as trainer:
        state = trainer.state
        losses = take_steps(trainer, 3)
        averages = {name: full_tensor(x).numpy() for name, x in state.ema.averages.items()}
        sample = None
        if draw:
            with state.ema.applied():
                sample = sampler.sample_images(state.model, torch.arange(4), config.sampling, config.seed).numpy()
        return sample, losses + take_steps(trainer, 2), averages


def test_sampling_between_steps_uses_the_averages_and_leaves_training_unchanged(settings, ranks):
    # Weights that stay gathered after a forward pass must not survive the swap with the averages. cfg_first calls the
    # encoder directly, not the model.
    common = ("parallel.strategy=fsdp", "parallel.reshard_after_forward=false", "sampling.order=cfg_first")
    config = settings(*common, "sampling.guidance=2")
    sampled = ranks(2, sample_between_steps, config, True)
    plain = ranks(2, sample_between_steps, settings(*common), False)
    assert sampled[0][1] == plain[0][1]
    averaged = UNITE.create(config.model, 0)
    averaged.load_state_dict({name: torch.from_numpy(x) for name, x in sampled[0][2].items()}, strict=False)
    expected = sampler.sample_images(averaged, torch.arange(4), config.sampling, config.seed)
    assert all(torch.equal(torch.from_numpy(sample), expected) for sample, *_ in sampled)


def reductions(config) -> tuple[int, int]:
    """Number of all-reduces in a step: those before its last flow losses, and all."""
    count, before, all_reduce, flow_losses = 0, 0, torch.distributed.all_reduce, train_step.flow_losses

    def counting_all_reduce(*arguments, **options):
        nonlocal count
        count += 1
        return all_reduce(*arguments, **options)

    def counting_flow_losses(*arguments):
        nonlocal before
        before = count
        return flow_losses(*arguments)

    with Run(config) as trainer:
        torch.distributed.all_reduce, train_step.flow_losses = counting_all_reduce, counting_flow_losses
        take_steps(trainer, 1)
        return before, count


def test_gradients_are_reduced_once_per_step_whatever_the_micro_batches(settings, ranks):
    model = settings().model
    # One per block and decoder layer; two for the norms of encoder and decoder; four for adaLN Linears, encoder,
    # decoder and model; one for the losses.
    sums = model.encoder.depth + model.decoder.depth + 2 + 4 + 1
    # The decoder's run before the flow losses: its layers, their norms, and its other parameters.
    decoder = model.decoder.depth + 2
    for micro_batch in (0, 2):
        config = settings("parallel.strategy=ddp", f"train.micro_batch={micro_batch}")
        assert ranks(2, reductions, config) == [(decoder, sums)] * 2


def skip_step(config) -> tuple[list[str], int, bool]:
    """A step with a NaN gradient on rank 0: changed tensors, skipped steps, and whether the next step is normal."""
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
def test_a_nan_gradient_on_one_rank_skips_the_step_on_all(world, settings, ranks):
    config = settings("optim.nonfinite=skip", "parallel.strategy=fsdp")
    assert ranks(world, skip_step, config) == [([], 1, True)] * world


GB = 10**9


def test_the_training_state_of_unite_b_has_3_5_gb():
    with torch.device("meta"):
        model = UNITE(load_config("imagenet256_b", ("perceptual.weight=0",)).model)
    assert round(state_bytes(model) / GB, 1) == 3.5


def test_a_parameter_with_fewer_rows_than_ranks_is_sharded_along_another_dimension():
    place = placement(4)
    assert place(torch.empty(12, 7)) is None  # the first dimension
    assert place(torch.empty(1, 16, 6)).dim == 1
    assert place(torch.empty(1, 3, 8)).dim == 2
    assert place(torch.empty(3)) is None  # the last rank has none of it


def train_and_save(config) -> int:
    from unite_fast.training.trainer import train

    return train(config).steps


def test_a_run_on_two_ranks_leaves_the_files_of_a_single_process(settings, ranks, capfd, trained_folder, mentions):
    short = ("train.steps=4", "train.log_every=2", "train.checkpoint_every=2")
    config = settings(*short, "train.precision=bfloat16", "parallel.strategy=auto")
    assert ranks(2, train_and_save, config) == [4, 4]
    out = capfd.readouterr().out
    assert re.search(mentions(2, 8, "ddp"), out)
    assert out.count("run folder") == 1
    files = {path.name for path in Path(config.train.out).iterdir()}
    assert files == {path.name for path in trained_folder.iterdir()}


def save_and_continue(config) -> list[list[float]]:
    with Run(config) as trainer:
        take_steps(trainer, 3)
        trainer.save()
        trainer.checkpoints.wait()
        return take_steps(trainer, 5)


def resume(config) -> list[list[float]]:
    with Run(config, resume=True) as trainer:
        assert trainer.state.step == 3
        return take_steps(trainer, 5)


@pytest.mark.parametrize("saved_by", ["fsdp", "ddp"])
def test_a_checkpoint_resumes_on_any_world_size(saved_by, settings, ranks):
    config = settings(f"parallel.strategy={saved_by}")
    expected = torch.tensor(ranks(4, save_and_continue, config)[0], dtype=torch.float64)
    folder = f"train.out={config.train.out}"
    for world, nodes, strategy in ((1, 1, "auto"), (2, 1, "ddp"), (4, 2, "hsdp"), (8, 1, "fsdp")):
        for losses in ranks(world, resume, settings(folder, f"parallel.strategy={strategy}"), nodes=nodes):
            difference = (torch.tensor(losses, dtype=torch.float64) - expected).abs()
            assert (difference <= TOLERANCE * expected)[:, :3].all(), (world, strategy)
