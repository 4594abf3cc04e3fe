"""Groups of one size and padded batches give the same losses and gradients; nothing of a pad reaches them."""

from pathlib import Path

import pytest
import torch

from unite_fast.data_pipeline.molecules.of_config import molecules_of
from unite_fast.data_pipeline.readers import Batch
from unite_fast.kernels import backend
from unite_fast.model.unite import UNITE
from unite_fast.objective import Losses
from unite_fast.randomness import Philox, at_step
from unite_fast.recipes import load_config
from unite_fast.training.molecule_batches import MoleculeBatches, Pass, permute, rotations
from unite_fast.training.train_state import TrainState
from unite_fast.training.train_step import TrainStep, accumulate_gradients

DATA = Path(__file__).parents[1] / "data" / "qm9_200.npz"
TINY = (
    f"data.path={DATA}",
    "molecules.heavy=0",
    "model.encoder.width=32",
    "model.encoder.depth=2",
    "model.decoder.width=32",
    "model.decoder.depth=1",
    "model.decoder.mlp_width=64",
    "model.decoder.embed_width=32",
    "train.batch_size=12",
    "train.device=cpu",
)
MOVED = ("molecules.rotate=random", "molecules.permute=true")
CPU = torch.device("cpu")
BATCHINGS = ("groups", "padded")


def configured(*overrides: str):
    return load_config("qm9_tiny", (*TINY, *overrides))


@pytest.fixture(scope="module")
def batch() -> Batch:
    source = molecules_of(configured(), "train")
    ids = torch.arange(3, 15)
    return Batch(*source.read(ids), ids)


def step_of(config, batch: Batch, micro_batch: int = 0) -> tuple[TrainStep, Losses, dict[str, torch.Tensor]]:
    """Losses and gradients of a step of a model whose output layers do not start at zero."""
    model = UNITE.create(config.model, 3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    step = TrainStep(TrainState(model, config), config, micro_batch=micro_batch)
    losses = step.accumulate(batch)
    return step, losses, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(one, other, loss: float = 1e-6, gradient: float = 1e-5) -> None:
    for name in ("total", "l1", "flow", "cross_entropy"):
        expected = getattr(one[1], name)
        assert expected > 0.1
        torch.testing.assert_close(getattr(other[1], name), expected, rtol=loss, atol=0)
    assert one[2].keys() == other[2].keys()
    for name, expected in one[2].items():
        assert (other[2][name] - expected).norm() <= gradient * expected.norm(), name


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("settings", [(), MOVED], ids=["plain", "moved"])
def test_groups_and_padded_batches_agree(settings, kernels, batch):
    if reason := backend.why_missing(kernels):
        pytest.skip(reason)
    with backend.using(kernels):
        groups, padded = (step_of(configured(f"molecules.batching={one}", *settings), batch) for one in BATCHINGS)
    assert len(groups[0].molecules.passes(batch.labels, 12)) > 3 and not groups[0].molecules.padded
    assert_close(groups, padded)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_micro_batches_match_the_whole_batch(batching, batch):
    whole, parts = (step_of(configured(f"molecules.batching={batching}"), batch, size) for size in (0, 2))
    assert_close(whole, parts)


def test_losses_are_means_over_atoms_and_not_over_molecules(batch):
    config = configured("molecules.batching=groups")
    _, losses, _ = step_of(config, batch)
    model = UNITE.create(config.model, 3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    batches, expected, atoms = MoleculeBatches(config, CPU), 0.0, 0
    positions = at_step(torch.arange(12), 0)
    for row, size in enumerate(batch.labels.tolist()):
        one = batches.make(
            Pass(slice(row, row + 1), size), batch.data, batch.labels, positions, torch.tensor(float(size))
        )
        expected += size * accumulate_gradients(model, [one], 1, config).total
        atoms += size
    assert losses.total.item() == pytest.approx(expected.item() / atoms, rel=1e-5)


def test_nothing_of_a_pad_reaches_losses_or_gradients(batch):
    config = configured("molecules.batching=padded")
    clean = step_of(config, batch)
    data = batch.data.clone()
    for row, size in enumerate(batch.labels.tolist()):
        data[row, size:] = float("nan")
    _, losses, gradients = step_of(config, Batch(data, batch.labels, batch.ids))
    for name in ("total", "l1", "flow", "cross_entropy"):
        assert torch.equal(getattr(losses, name), getattr(clean[1], name)), name
    assert all(torch.equal(gradients[name], gradient) for name, gradient in clean[2].items())


def test_passes_hold_one_size_each_and_every_molecule_once():
    sizes = torch.tensor([5, 9, 5, 7, 9, 5, 5])
    passes = MoleculeBatches(configured("molecules.batching=groups"), CPU).passes(sizes, 3)
    assert [(one.rows.tolist(), one.atoms) for one in passes] == [([0, 2, 5], 5), ([6], 5), ([3], 7), ([1, 4], 9)]
    padded = MoleculeBatches(configured("molecules.batching=padded"), CPU).passes(sizes, 4)
    assert [(one.rows, one.atoms) for one in padded] == [(slice(0, 4), 32), (slice(4, 8), 32)]


def test_batching_is_padded_where_shapes_must_be_static():
    cuda = torch.device("cuda")
    assert MoleculeBatches(configured(), cuda).padded and not MoleculeBatches(configured(), CPU).padded
    assert MoleculeBatches(configured("train.compile=true"), CPU).padded


def test_rotations_are_proper_and_uniform():
    drawn = rotations(Philox(7, 0, torch.arange(20_000))).double()
    identity = torch.eye(3, dtype=torch.float64).expand_as(drawn)
    torch.testing.assert_close(drawn @ drawn.mT, identity, rtol=0, atol=3e-6)
    torch.testing.assert_close(torch.linalg.det(drawn), torch.ones(20_000, dtype=torch.float64), rtol=0, atol=3e-6)
    trace = drawn.diagonal(dim1=1, dim2=2).sum(1)
    # Uniform over SO(3), a trace has mean 0 and variance 1, and a rotated vector is uniform over the sphere.
    assert abs(trace.mean()) < 5 * 20_000**-0.5 and abs(trace.var() - 1) < 0.05
    assert (drawn.mean(0).abs() < 5 * (3 * 20_000) ** -0.5).all()
    assert not torch.equal(drawn[0], drawn[1])


def test_permuted_molecules_keep_their_atoms_and_their_pads(batch):
    moved = permute(batch.data, batch.labels, Philox(0, 0, torch.arange(12)))
    assert not torch.equal(moved, batch.data)
    for before, after, size in zip(batch.data, moved, batch.labels.tolist(), strict=True):
        assert sorted(before[:size].tolist()) == sorted(after[:size].tolist())
        assert torch.equal(after[size:], before[size:])


def test_augmentation_moves_positions_and_keeps_distances(batch):
    config = configured("molecules.batching=padded", "molecules.rotate=random")
    batches, positions = MoleculeBatches(config, CPU), at_step(torch.arange(12), 4)
    made = batches.make(Pass(slice(0, 12), 32), batch.data, batch.labels, positions, torch.tensor(1.0))
    assert torch.equal(made.data[..., 0], batch.data[..., 0])
    before, after = (torch.cdist(x[..., 1:].double(), x[..., 1:].double()) for x in (batch.data, made.data))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert (made.data[..., 1:] - batch.data[..., 1:]).abs().max() > 0.5


def test_a_molecule_is_rotated_anew_in_each_step_and_alike_in_both_batchings(batch):
    moved = {}
    for batching in BATCHINGS:
        config = configured(f"molecules.batching={batching}", "molecules.rotate=random", "molecules.permute=true")
        batches = MoleculeBatches(config, CPU)
        for step in (0, 1):
            positions = at_step(torch.arange(12), step)
            for one in batches.passes(batch.labels, 12):
                made = batches.make(one, batch.data, batch.labels, positions, torch.tensor(1.0))
                for row, atoms in zip(torch.arange(12)[one.rows].tolist(), made.data, strict=True):
                    moved[batching, step, row] = atoms[: batch.labels[row]]
    for row in range(12):
        assert torch.equal(moved["groups", 0, row], moved["padded", 0, row])
        assert not torch.equal(moved["groups", 0, row], moved["groups", 1, row])
