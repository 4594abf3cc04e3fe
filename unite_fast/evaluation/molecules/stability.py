"""Stable atoms and molecules, by bond orders from a table of lengths (EDM, Hoogeboom et al., arXiv 2203.17003).

m molecules, T atoms of the largest.
"""

from collections.abc import Iterator

import numpy as np

from unite_fast.data_pipeline.molecules.elements import NUMBERS
from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet

VALENCES = {"H": 1, "C": 4, "N": 3, "O": 2, "F": 1}
"""Bonds of a stable atom, counted with their orders. Other elements are never stable."""
LENGTHS = (
    {"H-H": 74, "C-H": 109, "N-H": 101, "O-H": 96, "F-H": 92, "C-C": 154, "C-N": 147, "C-O": 143, "C-F": 135}
    | {"N-N": 145, "N-O": 140, "N-F": 136, "O-O": 148, "O-F": 142, "F-F": 142},
    {"C-C": 134, "C-N": 129, "C-O": 120, "N-N": 125, "N-O": 121, "O-O": 121},
    {"C-C": 120, "C-N": 116, "C-O": 113, "N-N": 110},
)
"""Lengths of single, double and triple bonds, pm."""
MARGINS = (10, 5, 3)
"""Two atoms closer than the length plus this have a bond of that order, or of a higher one; pm."""
_PAIRS = 1_000_000
"""Pairs of atoms in memory at a time."""


def _limits() -> np.ndarray:
    """Largest distance of a single, double and triple bond of two elements, pm, 0 for none: float64 [3, 119, 119]."""
    limits = np.zeros((3, 119, 119))
    for order, (lengths, margin) in enumerate(zip(LENGTHS, MARGINS, strict=True)):
        for pair, length in lengths.items():
            first, second = (NUMBERS[symbol] for symbol in pair.split("-"))
            limits[order, first, second] = limits[order, second, first] = length + margin
    return limits


_LIMITS = _limits()
_VALENCE = np.full(119, -1)
_VALENCE[[NUMBERS[symbol] for symbol in VALENCES]] = list(VALENCES.values())


def bond_orders(molecules: MoleculeSet) -> np.ndarray:
    """Bond orders 0 to 3 of all pairs of atoms: uint8 [m, T, T], symmetric, 0 in pads and for atoms whose position is
    not finite. Memory grows with m T^2; see `chunks`."""
    real = _real(molecules)
    numbers = _known(np.where(real, molecules.numbers, 0))
    positions = np.where(real[..., None], molecules.positions, 0).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        x, y, z = (np.square(axis[:, :, None] - axis[:, None, :]) for axis in np.moveaxis(positions, 2, 0))
        distances = 100 * np.sqrt(x + y + z)
    orders = np.zeros(distances.shape, np.uint8)
    # The limits fall with the order, so that the order is the number of limits that are kept. NaN keeps none.
    for limits in _LIMITS:
        orders += distances < limits[numbers[:, :, None], numbers[:, None, :]]
    orders[:, np.eye(real.shape[1], dtype=bool)] = 0
    return orders


def stable_atoms(molecules: MoleculeSet) -> np.ndarray:
    """Atoms whose bond orders sum to their element's valence: bool [m, T], False in pads and in all of a molecule with
    a position that is not finite."""
    parts = [_stable(part) for part in chunks(molecules)]
    return np.concatenate(parts) if parts else np.zeros(molecules.numbers.shape, bool)


def stable_molecules(molecules: MoleculeSet, atoms: np.ndarray | None = None) -> np.ndarray:
    """Molecules all of whose atoms are stable: bool [m].

    Args:
        atoms: `stable_atoms`, if they are known already.
    """
    atoms = stable_atoms(molecules) if atoms is None else atoms
    return np.all(atoms | ~_real(molecules), axis=1)


def finite_molecules(molecules: MoleculeSet) -> np.ndarray:
    """Molecules whose positions are all finite: bool [m]."""
    return np.all(np.isfinite(molecules.positions).all(2) | ~_real(molecules), axis=1)


def chunks(molecules: MoleculeSet) -> Iterator[MoleculeSet]:
    """The set in parts, in order, each with at most a million pairs of atoms."""
    rows = max(1, _PAIRS // max(1, molecules.numbers.shape[1]) ** 2)
    for start in range(0, len(molecules), rows):
        yield molecules.take(np.arange(start, min(start + rows, len(molecules))))


def _stable(molecules: MoleculeSet) -> np.ndarray:
    real = _real(molecules) & finite_molecules(molecules)[:, None]
    valences = bond_orders(molecules).sum(2, dtype=np.int64)
    return real & (valences == _VALENCE[_known(molecules.numbers)])


def _real(molecules: MoleculeSet) -> np.ndarray:
    """False in pads: bool [m, T]."""
    return np.arange(molecules.numbers.shape[1]) < molecules.sizes[:, None]


def _known(numbers: np.ndarray) -> np.ndarray:
    """Atomic numbers, 0 for those that no element has."""
    return np.where(numbers < 119, numbers, 0)
