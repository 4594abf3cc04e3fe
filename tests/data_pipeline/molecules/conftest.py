"""The fixture of 200 molecules of QM9, and small sets."""

from pathlib import Path

import numpy as np
import pytest

from unite_fast.data_pipeline.molecules.elements import NUMBERS
from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet

QM9_200 = Path(__file__).parents[2] / "data" / "qm9_200.npz"


@pytest.fixture
def qm9_200() -> Path:
    """140 training, 30 validation and 30 test molecules of QM9; tests do not change it."""
    return QM9_200


@pytest.fixture
def make_set():
    """Makes a molecule of each formula, such as "HHO", with atoms in a line, 1.5 A apart, about 0."""

    def make(*formulas: str) -> MoleculeSet:
        sizes = [len(formula) for formula in formulas]
        numbers = np.zeros((len(formulas), max(sizes)), np.uint8)
        positions = np.zeros((*numbers.shape, 3), np.float32)
        for row, formula in enumerate(formulas):
            numbers[row, : sizes[row]] = [NUMBERS[symbol] for symbol in formula]
            positions[row, : sizes[row], 0] = 1.5 * (np.arange(sizes[row]) - (sizes[row] - 1) / 2)
        return MoleculeSet.of(numbers, positions, sizes)

    return make
