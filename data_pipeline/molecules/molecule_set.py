"""Molecules in memory: elements, positions, split and names, one row a molecule.

m molecules, T atoms of the largest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

TRAIN, VALIDATION, TEST = range(3)
"""Values of `MoleculeSet.split`."""
SPLITS = ("train", "val", "test")
"""Their names."""
MOST_ATOMS = 256
"""Of a molecule in a file."""
LARGEST_COORDINATE = 1e6
"""Angstrom; a larger one in a file is a mistake."""


@dataclass
class MoleculeSet:
    numbers: np.ndarray
    """Atomic numbers, uint8 [m, T]; 0 in pads."""
    positions: np.ndarray
    """Angstrom, float32 [m, T, 3]; 0 in pads."""
    sizes: np.ndarray
    """Atoms of each molecule, int64 [m], from 1 to T."""
    split: np.ndarray
    """`TRAIN`, `VALIDATION` or `TEST`, uint8 [m]."""
    index: np.ndarray
    """Number of each molecule where it came from, int64 [m]."""
    smiles: list[str] = field(default_factory=list)
    """One a molecule, or empty."""
    inchi: list[str] = field(default_factory=list)
    """One a molecule, or empty."""

    @classmethod
    def of(cls, numbers: ArrayLike, positions: ArrayLike, sizes: ArrayLike) -> "MoleculeSet":
        """A set without splits and names, such as generated molecules."""
        sizes = np.asarray(sizes, np.int64)
        split, index = np.zeros(len(sizes), np.uint8), np.arange(len(sizes))
        return cls(np.asarray(numbers, np.uint8), np.asarray(positions, np.float32), sizes, split, index)

    @classmethod
    def join(cls, sets: Sequence["MoleculeSet"]) -> "MoleculeSet":
        """Sets without names and splits, of the same T, as one; numbered anew."""
        arrays = zip(*((one.numbers, one.positions, one.sizes) for one in sets), strict=True)
        return cls.of(*(np.concatenate(parts) for parts in arrays))

    def __len__(self) -> int:
        return len(self.sizes)

    def take(self, rows: ArrayLike) -> "MoleculeSet":
        """Some rows: their numbers, or a boolean mask [m]."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        smiles, inchi = ([names[row] for row in rows] if names else [] for names in (self.smiles, self.inchi))
        return MoleculeSet(
            self.numbers[rows],
            self.positions[rows],
            self.sizes[rows],
            self.split[rows],
            self.index[rows],
            smiles,
            inchi,
        )

    @property
    def heavy(self) -> np.ndarray:
        """Atoms that are not hydrogen, int64 [m]."""
        return (self.numbers > 1).sum(1)
