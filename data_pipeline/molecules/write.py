"""Write molecules to a file of the kind that its name says."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.data_pipeline.molecules.sdf import write_sdf
from unite_fast.data_pipeline.molecules.set_file import write_set
from unite_fast.data_pipeline.molecules.xyz import write_xyz

MOLECULE_FILES = (".xyz", ".sdf", ".npz")

BondsOf = Callable[[MoleculeSet], Sequence[np.ndarray]]
"""Molecules -> the bonds of each, int64 [k, 3]: two atoms and the order."""


def write_molecules(path: Path, molecules: MoleculeSet, suffix: str = "", bonds: BondsOf | None = None) -> None:
    """
    Args:
        suffix: one of `MOLECULE_FILES`; empty: that of `path`.
        bonds: for an .sdf.

    Raises:
        UserError: no space, or no permission.
    """
    suffix = suffix or path.suffix
    if suffix == ".xyz":
        write_xyz(path, molecules)
    elif suffix == ".sdf":
        write_sdf(path, molecules, bonds(molecules) if bonds else None)
    else:
        write_set(path, molecules)
