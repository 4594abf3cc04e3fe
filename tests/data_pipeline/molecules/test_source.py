from collections import Counter

import numpy as np
import pytest
import torch

from unite_fast.data_pipeline.loader import Loader
from unite_fast.data_pipeline.molecules.qm9 import TRAIN_SIZES
from unite_fast.data_pipeline.molecules.set_file import read_set, write_set
from unite_fast.data_pipeline.molecules.source import (
    MoleculeSource,
    open_molecules,
    size_histogram,
    synthetic_molecules,
)
from unite_fast.data_pipeline.splits import NoSplit
from unite_fast.errors import UserError
from unite_fast.randomness import permutation

ELEMENTS = ("H", "C", "N", "O", "F")


@pytest.fixture
def molecules(qm9_200):
    return read_set(qm9_200)


def test_a_sample_is_elements_and_positions(make_set):
    molecules = make_set("HHO", "CC")
    molecules.index[:] = [70, 71]
    source = MoleculeSource(molecules, ("C", "O", "H"), 4, title="QM9 molecule")
    samples, sizes = source.read([1, 0, 1])
    assert (samples.dtype, samples.shape, sizes.dtype, sizes.tolist()) == (
        *(torch.float32, (3, 4, 4), torch.int64, [2, 3, 2]),
    )
    assert samples[1].tolist() == [[2, -1.5, 0, 0], [2, 0, 0, 0], [1, 1.5, 0, 0], [0, 0, 0, 0]]
    assert samples[0].tolist() == [[0, -0.75, 0, 0], [0, 0.75, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    sample = np.full((4, 4), 9, np.float32)
    assert source.read_into(0, sample) == 3 and np.array_equal(sample, samples[1])
    assert (len(source), source.name(1), source.image_size) == (2, "QM9 molecule 71", 0)
    assert source.class_names == ["0", "1", "2", "3", "4"] and source.class_counts() == [0, 0, 1, 1, 0]
    assert source.sizes.dtype == np.int64 and source.sizes.tolist() == [3, 2]
    assert source.loaders == ("memory",)


def test_samples_are_copies(make_set):
    source = MoleculeSource(make_set("HHO"), ELEMENTS, 3)
    source.read([0])[0].fill_(7)
    assert source.read([0])[0][0, 0].tolist() == [0, -1.5, 0, 0]


def test_narrow_samples_of_a_wide_set(molecules):
    few = molecules.take(molecules.sizes <= 15)
    assert few.numbers.shape[1] == 29
    samples, sizes = MoleculeSource(few, ELEMENTS, 15).read(range(len(few)))
    assert samples.shape[1:] == (15, 4) and sizes.max() == 15
    assert torch.equal((samples[:, :, 1:] != 0).any(2).sum(1), sizes)


@pytest.mark.parametrize(
    ("elements", "atoms", "tokens"),
    [
        (("H", "C"), 29, "molecule 1 .* O"),
        (ELEMENTS, 2, "molecule 1 .* 3 .* 2"),
        ((*ELEMENTS, "Q"), 29, "'Q'"),
        (("H", "O", "C", "O"), 29, "twice"),
        ((), 29, "elements"),
    ],
)
def test_what_the_model_cannot_hold_is_one_line(make_set, elements, atoms, tokens):
    with pytest.raises(UserError, match=tokens):
        MoleculeSource(make_set("CC", "HHO", "C"), elements, atoms)


def test_no_molecules_are_one_line(make_set):
    with pytest.raises(UserError, match="no molecules"):
        MoleculeSource(make_set("CC").take([]), ELEMENTS, 29)


def test_the_fingerprint_depends_on_the_contents(make_set):
    def fingerprint(change=lambda molecules: None, elements=ELEMENTS):
        molecules = make_set("HHO", "CC")
        change(molecules)
        return MoleculeSource(molecules, elements, 4).fingerprint()

    def move(molecules):
        molecules.positions[0, 0, 0] += 1e-5

    def replace(molecules):
        molecules.numbers[1, 0] = 7

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(move), fingerprint(replace), fingerprint(elements=ELEMENTS[::-1])}) == 4


@pytest.fixture(scope="module")
def synthetic():
    """4096 molecules in groups of 32."""
    made = synthetic_molecules(ELEMENTS, 29, "train")
    return MoleculeSource(made.molecules, ELEMENTS, 29, group=32)


def groups_of(source, order):
    """The order cut into groups of `source.group`, full ones and rests, by the numbers that the docstring states."""
    counts = np.bincount(source.sizes)
    full = int((counts // source.group).sum())
    sizes = source.sizes[order.numpy()]
    first = order[: full * source.group].reshape(full, source.group)
    rests = np.split(sizes[full * source.group :], np.flatnonzero(np.diff(sizes[full * source.group :])) + 1)
    return first, rests, counts


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_groups_have_one_size_and_the_rests_come_last(synthetic, epoch):
    order = synthetic.order(7, epoch)
    assert order.dtype == torch.int64 and order.sort().values.tolist() == list(range(4096))
    full, rests, counts = groups_of(synthetic, order)
    sizes = synthetic.sizes[full.numpy()]
    assert len(full) > 100 and (sizes == sizes[:, :1]).all()
    assert sorted(len(rest) for rest in rests) == sorted(count % 32 for count in counts.tolist() if count % 32)
    assert all(len(set(rest.tolist())) == 1 for rest in rests)


def test_the_order_depends_only_on_seed_and_epoch(synthetic):
    order = synthetic.order(7, 3)
    again = MoleculeSource(synthetic.molecules, ELEMENTS, 29, group=32).order(7, 3)
    assert torch.equal(order, again)
    assert not torch.equal(order, synthetic.order(7, 4))
    assert not torch.equal(order, synthetic.order(8, 3))


def test_groups_and_their_order_change_with_the_epoch(synthetic):
    (first, rests, _), (second, other_rests, _) = (groups_of(synthetic, synthetic.order(7, epoch)) for epoch in (0, 1))
    sets = [{frozenset(group) for group in groups.tolist()} for groups in (first, second)]
    assert not sets[0] & sets[1]
    orders = [synthetic.sizes[groups[:, 0].numpy()].tolist() for groups in (first, second)]
    assert orders[0] != orders[1] and Counter(orders[0]) == Counter(orders[1])
    assert [rest[0] for rest in rests] != [rest[0] for rest in other_rests]
    assert orders[0] != sorted(orders[0])


def test_molecules_and_groups_are_uniformly_random(make_set):
    # Two groups of two, of each size, and a rest of one: how often each molecule is first, and which size is first.
    source = MoleculeSource(make_set(*["C"] * 5, *["CC"] * 4, "CCC"), ELEMENTS, 3, group=2)
    orders = np.stack([source.order(1, epoch).numpy() for epoch in range(2000)])
    assert (np.sort(orders, 1) == np.arange(10)).all()
    # Molecules 0 to 4 hold two of the four full groups; each starts the epoch with probability 1 / 10, 5 to 8 with 1/8.
    expected = np.array([*[200] * 5, *[250] * 4])
    found = np.bincount(orders[:, 0], minlength=9)
    assert (np.abs(found - expected) < 5 * np.sqrt(expected)).all()
    # The rests are one of the molecules 0 to 4, and 9, in either order.
    assert abs(int((orders[:, 9] == 9).sum()) - 1000) < 5 * np.sqrt(500)
    rests = np.bincount(orders[:, 8:][orders[:, 8:] < 9])
    assert len(rests) == 5 and (np.abs(rests - 400) < 5 * np.sqrt(400)).all()


@pytest.mark.parametrize("group", [0, 1])
def test_without_groups_the_order_is_the_usual_one(molecules, group):
    assert torch.equal(MoleculeSource(molecules, ELEMENTS, 29, group).order(3, 2), permutation(3, 2, 200))


def test_one_group_for_all(make_set):
    source = MoleculeSource(make_set("C", "C", "CC"), ELEMENTS, 2, group=50)
    assert source.order(0, 0).sort().values.tolist() == [0, 1, 2]


def test_the_loader_reads_it(synthetic):
    with Loader(synthetic, 64, 5) as loader:
        batch = next(loader)
    assert torch.equal(batch.ids, synthetic.order(5, 0)[:64])
    assert torch.equal(batch.data, synthetic.read(batch.ids)[0])
    assert batch.labels.tolist() == synthetic.sizes[batch.ids.numpy()].tolist()
    assert len(set(batch.labels[:32].tolist())) == len(set(batch.labels[32:].tolist())) == 1


@pytest.mark.parametrize(
    ("word", "name", "count", "held_out"),
    [
        ("train", "train", 140, False),
        ("val", "val", 30, True),
        ("validation", "val", 30, True),
        ("test", "test", 30, True),
        ("held-out", "val", 30, True),
    ],
)
def test_splits(qm9_200, word, name, count, held_out):
    source = open_molecules(qm9_200, word, ELEMENTS, 29)
    assert (source.split, len(source), source.held_out) == (name, count, held_out)


def test_held_out_is_the_test_split_if_there_is_no_other(tmp_path, molecules):
    write_set(tmp_path / "a.npz", molecules.take(molecules.split != 1))
    assert open_molecules(tmp_path / "a.npz", "held-out", ELEMENTS, 29).split == "test"
    with pytest.raises(NoSplit, match=r"a\.npz"):
        open_molecules(tmp_path / "a.npz", "val", ELEMENTS, 29)


def test_few_heavy_atoms(qm9_200, molecules):
    source = open_molecules(qm9_200, "train", ELEMENTS, 29, heavy=8, group=4)
    expected = molecules.take((molecules.split == 0) & (molecules.heavy <= 8))
    assert source.molecules.index.tolist() == expected.index.tolist() and 0 < len(source) < 140
    assert source.group == 4
    with pytest.raises(UserError, match=r"qm9_200\.npz.* 1 .*heavy"):
        open_molecules(qm9_200, "train", ELEMENTS, 29, heavy=1)


def test_what_cannot_be_opened_is_one_line(tmp_path, qm9_200):
    with pytest.raises(UserError, match=r"a\.npz.*unite-fast molecules qm9"):
        open_molecules(tmp_path / "a.npz", "train", ELEMENTS, 29)
    with pytest.raises(UserError, match="'first'"):
        open_molecules(qm9_200, "first", ELEMENTS, 29)


def test_synthetic_molecules_have_the_sizes_of_qm9():
    source = synthetic_molecules(ELEMENTS, 29, "train")
    expected = np.array(TRAIN_SIZES) * 4096 / 100_000
    assert (np.abs(size_histogram(source) - expected) < 5 * np.sqrt(expected) + 1).all()
    samples, sizes = source.read(range(4096))
    is_atom = torch.arange(29) < sizes[:, None]
    assert not samples[~is_atom].any()
    assert samples[..., 0][is_atom].long().bincount().min() > 0.19 * sizes.sum()
    # Centring takes one degree of freedom of each axis.
    spread = (samples[..., 1:].square().sum() / (3 * (sizes - 1).sum())).sqrt()
    assert abs(spread.item() - 1.4) < 0.02
    assert samples[..., 1:].sum(1).abs().max() < 1e-4


def test_synthetic_molecules_differ_by_split_and_end_at_atoms():
    train, again, held_out = (synthetic_molecules(ELEMENTS, 12, split) for split in ("train", "train", "held-out"))
    assert train.fingerprint() == again.fingerprint() != held_out.fingerprint()
    assert (train.split, train.held_out, held_out.split, held_out.held_out) == ("train", False, "val", True)
    assert len(train) == 4096 and train.sizes.min() >= 3 and train.sizes.max() == 12
    assert synthetic_molecules(ELEMENTS, 32, "test").sizes.max() == 29
    with pytest.raises(UserError, match=r"\b2\b"):
        synthetic_molecules(ELEMENTS, 2, "train")


def test_the_histogram_has_every_size(make_set):
    histogram = size_histogram(MoleculeSource(make_set("HHO", "CC", "HH"), ELEMENTS, 5))
    assert histogram.dtype == np.int64 and histogram.tolist() == [0, 0, 2, 1, 0, 0]
