"""Pictures: sizes, crosses of invalid molecules, frames of changed ones."""

import numpy as np
import pytest

from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.errors import UserError
from unite_fast.evaluation.molecules import pictures
from unite_fast.evaluation.molecules.pictures import molecule_grid, molecule_pairs

pytest.importorskip("rdkit", reason="RDKit is not installed")

SIZE, GAP = 120, 6
RED = (205, 32, 32)


def cell(page, row: int, column: int, extra: int = 0) -> np.ndarray:
    """A picture of a page, uint8 [SIZE, SIZE, 3]; `extra` pixels above it beside the gaps."""
    top, left = GAP + row * (SIZE + GAP) + extra, GAP + column * (SIZE + GAP)
    return np.asarray(page)[top : top + SIZE, left : left + SIZE]


def crossed(picture: np.ndarray) -> bool:
    """Red in the upper right corner, inside the frame."""
    return bool((picture[3:15, -15:-3] == RED).all(2).any())


def framed(picture: np.ndarray) -> bool:
    return bool((picture[[0, -1], 20:-20] == RED).all())


def test_a_grid_has_a_cell_for_each_molecule(few):
    page = molecule_grid(few.take([0, 1, 2, 3, 4]), columns=3, size=SIZE)
    assert page.mode == "RGB" and page.size == (3 * (SIZE + GAP) + GAP, 2 * (SIZE + GAP) + GAP)
    drawn = [[(cell(page, row, column)[5:-5, 5:-5] < 200).any() for column in range(3)] for row in range(2)]
    assert drawn == [[True, True, True], [True, True, False]]
    assert (cell(page, 1, 2) == 255).all() and (np.asarray(page)[:GAP] == 255).all()


def test_invalid_molecules_have_a_cross(few):
    few.sizes[1] = 4  # methyl
    few.positions[2, 1, 0] = np.nan
    few.positions[3] = 3e38
    page = molecule_grid(few, columns=6, size=SIZE)
    assert [crossed(cell(page, 0, column)) for column in range(6)] == [False, True, True, True, False, False]


def test_balls_have_the_colours_of_their_elements(few):
    page = molecule_grid(few.take([5]), columns=1, size=SIZE)
    few.positions[5, 5] = np.nan
    balls = molecule_grid(few.take([5]), columns=1, size=SIZE)
    for colour in ((230, 40, 30), (80, 190, 70)):
        # Reduction to the size shifts colours a little.
        near = [(np.abs(np.asarray(picture, int) - colour) < 12).all(2).any() for picture in (page, balls)]
        assert near == [False, True], colour


def test_pairs_mark_copies_with_other_bonds_or_elements(few):
    copies = few.take(range(6))
    copies.positions[1, 4] *= 4  # leaves two ions, which are valid
    copies.numbers[2, 1] = 8
    copies.positions[4] += 0.01
    page = molecule_pairs(few, copies, columns=3, size=SIZE)
    assert page.size == (3 * (SIZE + GAP) + GAP, 4 * (SIZE + GAP) + GAP + 2 * GAP)
    rows = [[cell(page, row, column, 2 * GAP * (row > 1)) for column in range(3)] for row in range(4)]
    assert [[framed(picture) for picture in row] for row in rows] == [
        *([False] * 3, [False, True, True]),
        *([False] * 3, [False] * 3),
    ]
    assert [crossed(picture) for picture in rows[0] + rows[1]] == [False, False, False, False, False, True]
    assert (rows[2][0] == rows[3][0]).all()
    with pytest.raises(UserError):
        molecule_pairs(few, copies.take([0]), columns=3)


def test_one_atom_and_no_molecule():
    alone = MoleculeSet.of([[7], [7]], [[[0, 0, 0]], [[np.nan, 0, 0]]], [1, 1])
    page = molecule_grid(alone, 2, SIZE)
    assert crossed(cell(page, 0, 0)) and crossed(cell(page, 0, 1))
    assert [(cell(page, 0, column)[20:-20] < 255).any() for column in (0, 1)] == [True, True]
    none = MoleculeSet.of(np.zeros((0, 1)), np.zeros((0, 1, 3)), [])
    assert molecule_grid(none, 2, SIZE).width == 2 * (SIZE + GAP) + GAP


def test_drawn_molecules_are_no_mirror_images():
    """Across, up and towards the viewer are a right-handed frame, for both hands of a molecule."""
    positions = np.random.default_rng(0).normal(size=(7, 3))
    for atoms in (positions, positions * [-1, 1, 1]):
        view = pictures._view(atoms, 200.0)
        shown = np.column_stack((view.at[:, 0], -view.at[:, 1], view.depth * view.scale))
        shown, centred = (x - x.mean(0) for x in (shown, atoms))
        assert np.linalg.det(np.linalg.lstsq(centred, shown, rcond=None)[0]) > 0
