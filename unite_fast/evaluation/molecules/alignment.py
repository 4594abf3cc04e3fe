"""Superposition of molecules, and their root mean square distance after it."""

import numpy as np

from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.errors import require


def kabsch_rmsd(a: np.ndarray, b: np.ndarray, sizes: np.ndarray | None = None) -> np.ndarray:
    """Root mean square distance of atoms of the same index after the best translation and proper rotation of `a`:
    min over R, t of sqrt( mean_i |R a_i + t - b_i|^2 ) (Kabsch, Acta Cryst. A32, 922, 1976). A mirror image is not
    aligned by a reflection. Computed in float64.

    Args:
        a, b: positions [m, T, 3].
        sizes: atoms of each molecule, [m], at least 1; the rows behind them are pads and may hold anything. Default T.

    Returns:
        float64 [m], in the unit of the positions; NaN for a molecule with a position that is not finite.
    """
    sizes = np.full(len(a), a.shape[1]) if sizes is None else sizes
    real = np.arange(a.shape[1]) < sizes[:, None]
    finite = _finite(a, real) & _finite(b, real)
    a, b = (_centred(positions, real & finite[:, None], sizes) for positions in (a, b))
    squared = np.square(a @ _best_rotations(a, b) - b).sum((1, 2)) / sizes
    return np.where(finite, np.sqrt(squared), np.nan)


def rmsd_of_sets(truth: MoleculeSet, copies: MoleculeSet) -> np.ndarray:
    """`kabsch_rmsd` of two sets of the same molecules, atom by atom in their order: float64 [m], Angstrom.

    Raises:
        UserError: they differ in the number of molecules, or in the size of one.
    """
    check_same_sizes(truth, copies)
    width = int(truth.sizes.max(initial=0))
    return kabsch_rmsd(truth.positions[:, :width], copies.positions[:, :width], truth.sizes)


def superposed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One molecule after the translation and proper rotation of `kabsch_rmsd` onto another.

    Args:
        a, b: finite positions [n, 3].

    Returns:
        float64 [n, 3], in the frame of `b`.
    """
    mean = b.mean(0, dtype=np.float64)
    a, b = a - a.mean(0, dtype=np.float64), b - mean
    return a @ _best_rotations(a[None], b[None])[0] + mean


def check_same_sizes(truth: MoleculeSet, copies: MoleculeSet) -> None:
    """Check that molecule i of both sets has the same number of atoms, for all i.

    Raises:
        UserError: it does not.
    """
    require(
        len(truth) == len(copies), f"{len(copies)} molecules cannot be compared with {len(truth)}: give as many of both"
    )
    differ = np.flatnonzero(truth.sizes != copies.sizes)
    require(
        not len(differ),
        f"molecule {differ[:1]} has another number of atoms than its truth: give both in the same order",
    )


def _best_rotations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """R [m, 3, 3], proper, with the least |a R - b|; a, b [m, T, 3] are centred, with 0 in pads."""
    u, _, vt = np.linalg.svd(a.swapaxes(1, 2) @ b)
    # The axis of the smallest singular value turns over where u vt would be a reflection.
    u[:, :, 2] *= np.sign(np.linalg.det(u @ vt))[:, None]
    return u @ vt


def _finite(positions: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Which molecules have finite positions, pads apart: bool [m]."""
    return np.all(np.isfinite(positions).all(2) | ~real, axis=1)


def _centred(positions: np.ndarray, real: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Positions minus their mean, 0 in pads: float64 [m, T, 3]."""
    positions = np.where(real[..., None], positions, 0).astype(np.float64)
    mean = positions.sum(1, keepdims=True) / sizes[:, None, None]
    return np.where(real[..., None], positions - mean, 0)
