import numpy as np
import pytest


def test_heavy_atoms_are_not_hydrogen(make_set):
    assert make_set("HHO", "CC", "H").heavy.tolist() == [1, 2, 0]


@pytest.mark.parametrize("rows", [[2, 0], np.array([2, 0])])
def test_take_keeps_every_field(make_set, rows):
    molecules = make_set("HHO", "CC", "H")
    molecules.split[:] = [0, 1, 2]
    molecules.index[:] = [5, 6, 7]
    molecules.smiles = ["O", "CC", "[H]"]
    taken = molecules.take(rows)
    assert (taken.sizes.tolist(), taken.split.tolist(), taken.index.tolist()) == ([1, 3], [2, 0], [7, 5])
    assert taken.numbers.tolist() == [[1, 0, 0], [1, 1, 8]]
    assert np.array_equal(taken.positions, molecules.positions[[2, 0]])
    assert (taken.smiles, taken.inchi, len(taken)) == (["[H]", "O"], [], 2)


def test_take_by_a_mask(make_set):
    molecules = make_set("HHO", "CC", "H")
    assert molecules.take(molecules.sizes < 3).index.tolist() == [1, 2]
    assert molecules.take(np.zeros(3, bool)).numbers.shape == (0, 3)
