"""Small molecules with typed coordinates, and the first molecules of QM9's test split."""

import csv
import importlib.util
import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from unite_fast.data_pipeline.molecules.elements import NUMBERS
from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet

WHOLE = 1000
# Angstrom; experimental geometries, rounded.
TYPED = {
    "water": "O 0 0 0  H .757 .586 0  H -.757 .586 0",
    "methane": "C 0 0 0  H .629 .629 .629  H .629 -.629 -.629  H -.629 .629 -.629  H -.629 -.629 .629",
    "hydrogen cyanide": "C 0 0 0  N 1.156 0 0  H -1.064 0 0",
    "carbon dioxide": "C 0 0 0  O 1.163 0 0  O -1.163 0 0",
    "ethylene": "C .669 0 0  C -.669 0 0  H 1.232 .929 0  H 1.232 -.929 0  H -1.232 .929 0  H -1.232 -.929 0",
    "fluoromethanol": "C 0 0 0  F .78 .78 .78  O .81 -.81 -.81  H -.63 .63 -.63  H -.63 -.63 .63  H 1.4 -.25 -1.32",
}


def pack(*molecules: tuple[list[int], np.ndarray]) -> MoleculeSet:
    """Numbers and positions of each molecule -> a set with pads."""
    sizes = [len(numbers) for numbers, _ in molecules]
    packed = np.zeros((len(molecules), max(sizes)), np.uint8), np.zeros((len(molecules), max(sizes), 3), np.float32)
    for row, atoms in enumerate(molecules):
        for array, values in zip(packed, atoms, strict=True):
            array[row, : sizes[row]] = values
    return MoleculeSet.of(*packed, sizes)


def typed(name: str) -> tuple[list[int], np.ndarray]:
    words = np.array(TYPED[name].split()).reshape(-1, 4)
    return [NUMBERS[symbol] for symbol in words[:, 0]], words[:, 1:].astype(float)


@pytest.fixture
def few() -> MoleculeSet:
    """Of `TYPED`, in that order."""
    return pack(*map(typed, TYPED))


@pytest.fixture(scope="session")
def qm9() -> MoleculeSet:
    """The first 1,000 molecules of QM9's test split."""
    spec = importlib.util.find_spec("qm9pack")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("qm9pack is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    wanted = np.random.RandomState(0).permutation(130_831)[117_748:][:WHOLE].tolist()
    rows = set(wanted)
    lines: dict[int, str] = {}
    files = [(folder / f"qm9_part{part}.csv").open() for part in (1, 2, 3)]
    names = next(csv.reader([next(files[0])]))
    all_lines = itertools.chain(files[0], *(itertools.islice(file, 1, None) for file in files[1:]))
    for number, line in enumerate(all_lines):
        if number in rows:
            lines[number] = line
    table = [dict(zip(names, row, strict=True)) for row in csv.reader(lines[number] for number in wanted)]
    atoms = []
    for row in table:
        numbers = [NUMBERS[symbol] for symbol in row["Elements"].strip("[]").replace("'", "").split(",")]
        positions = np.array(row["XYZ_Ang"].replace("[", "").replace("]", "").split(","), float).reshape(-1, 3)
        atoms.append((numbers, positions - positions.mean(0)))
    molecules = pack(*atoms)
    molecules.inchi = [row["InChi"] for row in table]
    return molecules


@pytest.fixture(scope="session")
def noised_qm9(qm9) -> dict[float, MoleculeSet]:
    """Copies with N(0, s) Angstrom on each coordinate, for each s in turn drawn molecule by molecule."""
    random, copies = np.random.RandomState(1), {}
    for deviation in (0.01, 0.02, 0.04, 0.08):
        copies[deviation] = qm9.take(range(len(qm9)))
        for row, size in enumerate(qm9.sizes):
            copies[deviation].positions[row, :size] = qm9.positions[row, :size] + random.normal(0, deviation, (size, 3))
    return copies


@pytest.fixture(scope="session")
def scored() -> int:
    """Molecules of QM9 to score: 300, or with MOLECULES_SCORED=1000 all, of which the specification has the numbers."""
    return int(os.environ.get("MOLECULES_SCORED", "300"))
