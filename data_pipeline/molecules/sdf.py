"""SDF files: connection tables (MDL, V2000 and V3000), each ended by $$$$. RDKit reads them; V2000 is written here."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from unite_fast.data_pipeline.molecules.elements import SYMBOLS
from unite_fast.data_pipeline.molecules.frames import (
    BrokenMolecule,
    Frame,
    LeftOut,
    Lines,
    check_count,
    check_some,
    make_frame,
)
from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.errors import UserError, require, shown
from unite_fast.utils.files import atomic_write

MOST_BONDS = 999
"""Of a V2000 table."""
LARGEST_BLOCK = 2**22
"""Characters of a connection table; that of `MOST_ATOMS` atoms has some 40,000."""


def read_sdf(path: Path, left_out: LeftOut) -> Iterator[tuple[int, Frame]]:
    """The good molecules of a file, each with its number in the file, from 1. The broken ones go into `left_out`.

    Only elements and positions are read. A molecule whose header says 2D, with z = 0 everywhere, is a drawing and
    counts as broken.

    Raises:
        UserError: RDKit is missing; the file cannot be read, is empty or has no good molecule.
    """
    try:
        from rdkit import Chem, rdBase
    except ImportError as error:
        raise UserError(
            f"{path} needs RDKit, which is not installed: pip install 'unite-fast[molecules]', or give .xyz files"
        ) from error
    found = 0
    with Lines(path) as lines, rdBase.BlockLogs():
        for number, block in enumerate(_blocks(lines), 1):
            try:
                frame = _read_block(block, Chem)
            except BrokenMolecule as reason:
                left_out.add(path, number, reason)
                continue
            found += 1
            yield number, frame
    check_some(found, path, left_out)


def _blocks(lines: Lines) -> Iterator[list[str]]:
    """The lines of each connection table; those between M  END and $$$$ are data that we do not use."""
    while lines.next is not None:
        block, length, ended = [], 0, False
        while (line := lines.take()) is not None and not line.startswith("$$$$"):
            if not ended and length <= LARGEST_BLOCK:
                block.append(line)
                length += len(line)
            ended = ended or line.startswith("M  END")
        if line is not None or any(map(str.strip, block)):
            yield block


def _read_block(block: list[str], chem) -> Frame:
    """Read a connection table by `chem`, the module rdkit.Chem.

    Raises:
        BrokenMolecule: it is broken.
    """
    if len(block) < 4:
        raise BrokenMolecule("no connection table")
    if sum(map(len, block)) > LARGEST_BLOCK:
        raise BrokenMolecule("its connection table is too long")
    if "V3000" not in block[3] and block[3][:3].strip().isdecimal():
        check_count(int(block[3][:3]))
    molecule = chem.MolFromMolBlock("\n".join(block) + "\n", sanitize=False, removeHs=False)
    if molecule is None:
        raise BrokenMolecule("RDKit cannot read its connection table")
    check_count(molecule.GetNumAtoms())
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    if 0 in numbers:
        raise BrokenMolecule(f"{shown(molecule.GetAtomWithIdx(numbers.index(0)).GetSymbol())} is no element")
    positions = np.array(molecule.GetConformer().GetPositions(), np.float64)
    if block[1][20:22].upper() == "2D" and not positions[:, 2].any():
        raise BrokenMolecule("a drawing (2D), without positions in space")
    return make_frame(numbers, positions)


def write_sdf(path: str | Path, molecules: MoleculeSet, bonds: Sequence[ArrayLike] | None = None) -> None:
    """Write all molecules to one SDF file, with four digits after the point; a file at `path` is replaced.

    The title of a molecule is its SMILES, or else its `index`.

    Args:
        bonds: for each molecule int [k, 3]: two atoms, from 0, and the order, 1 to 3, or 4 for an aromatic bond.

    Raises:
        UserError: the file cannot be written; a bond is no bond, or there are more than `MOST_BONDS`; a position does
            not fit into the columns of the format.
    """
    if bonds is not None:
        require(len(bonds) == len(molecules), f"bonds of {len(bonds)} molecules for {len(molecules)} molecules")
    with atomic_write(Path(path)) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        for row in range(len(molecules)):
            title = molecules.smiles[row] if molecules.smiles else str(molecules.index[row])
            file.write(f"{title}\n{'':2}{'unite':8}{'':10}3D\n\n")
            size = int(molecules.sizes[row])
            table = np.asarray([] if bonds is None else bonds[row], np.int64).reshape(-1, 3)
            _check_table(row, size, molecules.positions[row, :size], table)
            file.write(f"{size:3d}{len(table):3d}  0  0  0  0  0  0  0  0999 V2000\n")
            positions = molecules.positions[row, :size].tolist()
            for number, (x, y, z) in zip(molecules.numbers[row, :size].tolist(), positions, strict=True):
                file.write(f"{x:10.4f}{y:10.4f}{z:10.4f} {SYMBOLS[number]:<3}{' 0' + '  0' * 11}\n")
            for first, second, order in table.tolist():
                file.write(f"{first + 1:3d}{second + 1:3d}{order:3d}  0\n")
            file.write("M  END\n$$$$\n")


def _check_table(row: int, size: int, positions: np.ndarray, table: np.ndarray) -> None:
    require(
        bool((np.abs(positions) < 9999).all()), f"molecule {row} has a position beyond 9,999 A, which SDF cannot hold"
    )
    require(size < 1000 and len(table) <= MOST_BONDS, f"molecule {row} has too many atoms or bonds for SDF (V2000)")
    first, second, order = table.T
    atoms = (table[:, :2] >= 0).all(1) & (table[:, :2] < size).all(1) & (first != second)
    good = atoms & (order >= 1) & (order <= 4)
    require(bool(good.all()), f"molecule {row} has a bond that is no bond of its atoms")
