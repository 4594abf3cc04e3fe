"""Kabsch's distance: of rotated, noisy and mirrored copies, by its definition, and with pads."""

import numpy as np
import pytest

from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.errors import UserError
from unite_fast.evaluation.molecules.alignment import kabsch_rmsd, rmsd_of_sets, superposed


def rotations(count: int, seed: int = 0) -> np.ndarray:
    """Proper rotations, [count, 3, 3]."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(count, 3, 3)))
    return q * np.linalg.det(q)[:, None, None]


@pytest.fixture
def atoms() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(20, 9, 3))


def test_a_moved_copy_has_distance_zero(atoms):
    moved = atoms @ rotations(20) + np.random.default_rng(2).normal(size=(20, 1, 3))
    distance = kabsch_rmsd(atoms, moved)
    assert distance.shape == (20,) and distance.dtype == np.float64
    assert distance.max() < 1e-14


def test_no_rotation_is_better(atoms):
    copies = atoms + 0.3 * np.random.default_rng(3).normal(size=atoms.shape)
    best = kabsch_rmsd(atoms, copies)
    centred = atoms - atoms.mean(1, keepdims=True), copies - copies.mean(1, keepdims=True)
    axes = np.linalg.svd(centred[0].swapaxes(1, 2) @ centred[1])
    assert (np.linalg.det(axes[0] @ axes[2]) > 0).all(), "else the best rotation is not u vt"
    by_definition = np.sqrt(np.square(centred[0] @ (axes[0] @ axes[2]) - centred[1]).sum((1, 2)) / 9)
    assert best == pytest.approx(by_definition, abs=1e-13)
    for rotation in rotations(50):
        assert (np.sqrt(np.square(centred[0] @ rotation - centred[1]).sum((1, 2)) / 9) >= best).all()


def test_a_mirror_image_is_not_turned_into_its_original(atoms):
    assert kabsch_rmsd(atoms, -atoms).min() > 0.1
    flat = atoms * [1, 1, 0]
    assert kabsch_rmsd(flat, flat * [-1, 1, 1]).max() < 1e-14, "but a flat one may be turned over"


def test_superposed_molecules_have_the_least_distance(atoms):
    moved = (atoms[0] + 0.1 * atoms[1]) @ rotations(1)[0] + [3, -2, 5]
    for original in (atoms[0], atoms[0].astype(np.float32)):
        placed = superposed(moved, original)
        distance = np.sqrt(np.square(placed - original).sum(1).mean())
        assert distance == pytest.approx(kabsch_rmsd(moved[None], original[None].astype(float))[0], abs=1e-12)
    again, mirrored = superposed(placed, placed), superposed(-placed, placed)
    assert again == pytest.approx(placed, abs=1e-12)
    assert np.linalg.norm(mirrored - placed) > 1


def test_pads_do_not_count(atoms):
    sizes = np.arange(20) % 9 + 1
    copies = atoms + 0.1 * np.random.default_rng(3).normal(size=atoms.shape)
    alone = [kabsch_rmsd(a[None, :n], b[None, :n])[0] for a, b, n in zip(atoms, copies, sizes, strict=True)]
    for array in (atoms, copies):
        array[np.arange(9) >= sizes[:, None]] = np.nan
    together = kabsch_rmsd(atoms, copies, sizes)
    assert together == pytest.approx(np.array(alone), abs=1e-13)
    assert (together[sizes == 1] == 0).all()


def test_positions_that_are_not_finite_give_nan_to_their_molecule_alone(atoms):
    copies = atoms.copy()
    copies[3, 2, 1], copies[5, 0, 0] = np.nan, np.inf
    assert np.flatnonzero(np.isnan(kabsch_rmsd(atoms, copies))).tolist() == [3, 5]


def test_sets_of_other_sizes_are_refused(few, mentions):
    assert rmsd_of_sets(few, few).max() < 1e-7
    wider = MoleculeSet.of(
        np.pad(few.numbers, ((0, 0), (0, 4))), np.pad(few.positions, ((0, 0), (0, 4), (0, 0))), few.sizes
    )
    assert rmsd_of_sets(few, wider).max() < 1e-7
    with pytest.raises(UserError, match=mentions(5, 6)):
        rmsd_of_sets(few, few.take(range(5)))
    with pytest.raises(UserError, match=r"molecule .*0"):
        rmsd_of_sets(few, few.take([1, 0, 2, 3, 4, 5]))
