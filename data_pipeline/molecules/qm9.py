"""QM9 (Ramakrishnan, Dral, Rupp, von Lilienfeld, Scientific Data 1, 140022, 2014) from the package qm9pack.

130,831 molecules of H, C, N, O and F with at most 9 heavy atoms. qm9pack is only a carrier of three CSV files. It is
not imported, because that would need pandas and others that we do not use: `pip install --no-deps qm9pack` is enough.
"""

import csv
import hashlib
import importlib.util
import operator
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unite_fast.data_pipeline.molecules.elements import NUMBERS, SYMBOLS
from unite_fast.data_pipeline.molecules.molecule_set import TEST, TRAIN, VALIDATION, MoleculeSet
from unite_fast.errors import UserError, reason_of, require
from unite_fast.utils.progress import track

ROWS, LARGEST = 130_831, 29
"""Molecules, and atoms of the largest."""
FILES = tuple(f"qm9_part{part}.csv" for part in (1, 2, 3))
TRAINING, VALIDATING = 100_000, 17_748
"""Molecules for training and validation; the rest is for testing."""
TRAIN_SIZES = (
    *(0, 0, 0, 1, 4, 5, 9, 16, 49, 124, 362, 807, 1689, 3060, 5136, 7796, 10644, 13025, 13364, 13832, 9482, 9970, 3393),
    *(4848, 539, 1506, 48, 266, 0, 25),
)
"""Number of training molecules with 0, 1, ... 29 atoms."""

_ATOMS = {"H": 1_208_486, "C": 831_925, "N": 132_498, "O": 183_265, "F": 3_036}
_DEVIATIONS, _FURTHEST = (1.3977, 1.3195, 1.6069, 1.2399), 7.3856
"""Standard deviation of all coordinates and of x, y, z in float64, and the largest |x|, Angstrom, to four digits."""
_PERMUTATION = "77989252ff8c8309ea7b219943daf0d125303346daf87750b1f0bafcc1198c12"
_OTHER = "install version 1.0.3 (pip install --force-reinstall --no-deps qm9pack==1.0.3)"
_COLUMNS = ("Index", "SMILES", "InChi", "Elements", "XYZ_Ang")
_AT_ONCE = 1000
"""Rows between two updates of the bar."""


def import_qm9() -> MoleculeSet:
    """The whole data set, in the package's order, centred on the unweighted mean of the atoms in float64.

    The split is that of EDM (Hoogeboom et al., 2022) by size: 100,000, 17,748 and 13,083 molecules of a permutation by
    numpy's `RandomState(0)`. `index` is the number of QM9, from 1.

    Raises:
        UserError: qm9pack is missing, or has other contents than version 1.0.3.
    """
    numbers = np.zeros((ROWS, LARGEST), np.uint8)
    positions = np.zeros((ROWS, LARGEST, 3), np.float32)
    sizes, index = np.zeros(ROWS, np.int64), np.zeros(ROWS, np.int64)
    smiles, inchi = [], []
    records = _records(_folder())
    chunks = track(iter(lambda: list(islice(records, _AT_ONCE)), []), -(-ROWS // _AT_ONCE), "Reading QM9, by thousands")
    for row, record in enumerate(record for chunk in chunks for record in chunk):
        require(row < ROWS, f"qm9pack has more than {ROWS:,} molecules: {_OTHER}")
        index[row], elements, coordinates = record.number, record.elements, record.positions
        sizes[row] = size = len(elements)
        numbers[row, :size] = elements
        positions[row, :size] = coordinates - coordinates.mean(0)
        smiles.append(record.smiles)
        inchi.append(record.inchi)
    require(len(smiles) == ROWS, f"qm9pack has {len(smiles):,} molecules, not {ROWS:,}: {_OTHER}")
    molecules = MoleculeSet(numbers, positions, sizes, split_qm9(), index, smiles, inchi)
    check_contents(molecules)
    return molecules


def split_qm9() -> np.ndarray:
    """The split of each molecule, uint8 [130831].

    Raises:
        UserError: numpy gives another permutation than it used to.
    """
    permutation = permute_qm9()
    split = np.full(ROWS, TEST, np.uint8)
    split[permutation[:TRAINING]] = TRAIN
    split[permutation[TRAINING : TRAINING + VALIDATING]] = VALIDATION
    return split


def permute_qm9() -> np.ndarray:
    """The permutation that gives the split, int64 [130831].

    Raises:
        UserError: numpy gives another permutation than it used to.
    """
    permutation = np.random.RandomState(0).permutation(ROWS).astype("<i8")
    digest = hashlib.sha256(permutation.tobytes()).hexdigest()
    require(digest == _PERMUTATION, "this version of numpy permutes differently, so QM9's split would be another")
    return permutation


def check_contents(molecules: MoleculeSet) -> None:
    """Check the numbers of atoms, the spread of the coordinates and the sizes of the training molecules.

    Raises:
        UserError: they are not those of QM9.
    """
    counts = np.bincount(molecules.numbers[molecules.numbers > 0], minlength=len(SYMBOLS))
    found = {SYMBOLS[number]: int(count) for number, count in enumerate(counts) if count}
    require(found == _ATOMS, f"qm9pack has the atoms {found}, not {_ATOMS}: {_OTHER}")
    coordinates = molecules.positions[molecules.numbers > 0].astype(np.float64)
    spread = (coordinates.std(), *coordinates.std(0), np.abs(coordinates).max())
    good = np.abs(np.array(spread) - (*_DEVIATIONS, _FURTHEST)).max() <= 1e-4
    require(good, f"the spread of qm9pack's coordinates is {np.round(spread, 4).tolist()}, not that of QM9: {_OTHER}")
    sizes = np.bincount(molecules.sizes[molecules.split == TRAIN], minlength=LARGEST + 1)
    require(tuple(sizes.tolist()) == TRAIN_SIZES, f"qm9pack's training molecules have other sizes than QM9's: {_OTHER}")


def _folder() -> Path:
    """The folder of the CSV files."""
    found = importlib.util.find_spec("qm9pack")  # without an import of it
    places = list(found.submodule_search_locations or ()) if found else []
    require(bool(places), "QM9 comes with the package qm9pack: pip install 'unite-fast[molecules]'")
    return Path(places[0]) / "data"


class _Record(NamedTuple):
    """A molecule: its number in QM9, atomic numbers, positions float64 [n, 3] in Angstrom, and names."""

    number: int
    elements: list[int]
    positions: np.ndarray
    smiles: str
    inchi: str


def _records(folder: Path) -> Iterator[_Record]:
    """The molecules of all files.

    Raises:
        UserError: a file cannot be read, or a column or a molecule is broken.
    """
    for path in (folder / name for name in FILES):
        lines = 0
        try:
            with path.open(encoding="utf-8", newline="") as file:
                reader = csv.reader(file)
                names = next(reader, [])
                choose = operator.itemgetter(*map(names.index, _COLUMNS))
                for row in reader:
                    lines = reader.line_num
                    yield _parse(*choose(row))
        except (OSError, ValueError, LookupError, csv.Error) as error:
            raise UserError(f"cannot read {path}, line {lines}: {reason_of(error)}; {_OTHER}") from error


def _parse(number: str, smiles: str, inchi: str, elements: str, positions: str) -> _Record:
    """
    Args:
        elements: ['C','H',...]
        positions: [[x,y,z],...]; not all numbers are JSON's, such as 1. and .5

    Raises:
        ValueError, KeyError: a column is broken.
    """
    symbols = [NUMBERS[word] for word in elements.strip("[]").replace("'", "").split(",")]
    coordinates = np.array([float(word) for word in positions.replace("[", "").replace("]", "").split(",")])
    if not (len(symbols) <= LARGEST and len(coordinates) == 3 * len(symbols) and np.isfinite(coordinates).all()):
        raise ValueError(f"{len(symbols)} elements and {len(coordinates)} coordinates")
    return _Record(int(number), symbols, coordinates.reshape(-1, 3), smiles, inchi)
