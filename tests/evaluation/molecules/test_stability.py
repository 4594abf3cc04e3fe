"""Bond orders and stable atoms of typed molecules, and those of QM9 as specified."""

import numpy as np
import pytest

from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.evaluation.molecules import stability
from unite_fast.evaluation.molecules.stability import bond_orders, stable_atoms, stable_molecules


def test_bond_orders_of_typed_molecules(few):
    orders = bond_orders(few)
    assert orders.dtype == np.uint8 and (orders == orders.swapaxes(1, 2)).all()
    assert [np.triu(each).sum() for each in orders] == [2, 4, 4, 4, 6, 5]
    assert orders[2, :2, :3].tolist() == [[0, 3, 1], [3, 0, 0]]
    assert orders[3, 0].tolist() == [0, 2, 2, 0, 0, 0] and orders[4, 0, 1] == 2


@pytest.mark.parametrize(
    ("pair", "limits"),
    [((6, 6), (164, 139, 123)), ((6, 1), (119, 0, 0)), ((7, 8), (150, 126, 0)), ((9, 9), (152, 0, 0))],
)
def test_a_bond_is_shorter_than_its_length_and_margin(pair, limits):
    for order, limit in enumerate(limits, 1):
        if limit:
            # Exact steps of float32 around the limit.
            near, far = np.float32(limit / 100) * np.float32([1 - 1e-5, 1 + 1e-5])
            at = [[[0, 0, 0], [0, distance, 0]] for distance in (near, far)]
            assert bond_orders(MoleculeSet.of([pair, pair], at, [2, 2]))[:, 0, 1].tolist() == [order, order - 1]


def test_every_pair_of_the_five_elements_has_a_single_bond_and_higher_ones_are_shorter():
    singles, doubles, triples = stability.LENGTHS
    assert len(singles) == 15 and triples.keys() < doubles.keys() < singles.keys()
    for higher, lower in ((doubles, singles), (triples, doubles)):
        assert all(length + 5 < lower[pair] for pair, length in higher.items())


def test_the_lengths_are_those_of_the_specification():
    assert [sum(lengths.values()) for lengths in stability.LENGTHS] == [1904, 750, 459]
    assert [stability.LENGTHS[0][pair] for pair in ("C-O", "N-O", "N-F", "O-O")] == [143, 140, 136, 148]


def test_typed_molecules_are_stable_until_an_atom_leaves(few):
    real = np.arange(6) < few.sizes[:, None]
    assert (stable_atoms(few) == real).all() and stable_molecules(few).all()
    few.positions[1, 4] *= 3
    assert (stable_atoms(few) == real).sum() == real.size - 2, "carbon, and the hydrogen that left"
    assert stable_molecules(few).tolist() == [True, False, True, True, True, True]


def test_other_elements_are_never_stable(few):
    few.numbers[0, 0], few.numbers[1, 0], few.numbers[2, 1] = 16, 14, 250
    assert stable_atoms(few).sum(1)[:4].tolist() == [0, 0, 1, 3]


def test_positions_that_are_not_finite_are_not_stable_and_pads_do_not_count(few):
    few.positions[~(np.arange(6) < few.sizes[:, None])] = np.nan
    assert stable_molecules(few).all()
    few.positions[1, 4, 0], few.positions[3, 0, 2] = np.nan, np.inf
    assert stable_atoms(few).any(1).tolist() == [True, False, True, False, True, True]
    few.positions[4, 0] = 3e38
    assert not stable_molecules(few)[4]


def test_chunks_give_the_same_as_the_whole(few, monkeypatch):
    many = few.take(np.arange(60) % 6)
    many.positions += np.random.default_rng(0).normal(0, 0.05, many.positions.shape).astype(np.float32)
    whole = stable_atoms(many)
    monkeypatch.setattr(stability, "_PAIRS", 7 * 36 + 1)
    assert [len(part) for part in stability.chunks(many)] == [7] * 8 + [4]
    assert (stable_atoms(many) == whole).all() and 0 < whole.mean() < 1


def test_no_molecules():
    none = MoleculeSet.of(np.zeros((0, 5)), np.zeros((0, 5, 3)), [])
    assert stable_atoms(none).shape == (0, 5) and stable_molecules(none).shape == (0,)


def test_qm9_is_as_stable_as_specified(qm9):
    atoms = stable_atoms(qm9)
    assert (qm9.sizes.sum(), atoms.sum(), stable_molecules(qm9, atoms).sum()) == (18_041, 17_909, 947)
