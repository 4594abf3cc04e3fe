"""Which molecule a set of atoms is: bonds and names by RDKit, from elements and positions alone.

Every function takes one molecule without pads: atomic numbers, integers [n], and positions, [n, 3], Angstrom.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from unite_fast.data_pipeline.molecules.elements import NUMBERS
from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.errors import UserError
from unite_fast.evaluation.molecules.stability import VALENCES, bond_orders

MAX_ITERATIONS = 1_000
"""Of RDKit's search for valences that fit. Of 26,167 molecules of QM9, 24,900 are valid within 64, and 24,903 within
1,000 or 100,000. A thousand take up to .3 s for 32 atoms of nitrogen."""
MAX_ATOMS = 512
FARTHEST = 1_000.0
"""Coordinates beyond this, Angstrom, are no molecule."""
STEREO_LAYERS = "btms"
"""First letters of the layers of an InChI that tell double bonds and centres apart by their stereochemistry."""
_EDM_ELEMENTS = [NUMBERS[symbol] for symbol in VALENCES]


@dataclass(frozen=True)
class Perceived:
    """What was found: an RDKit molecule with all its atoms in their order, or None."""

    molecule: Any = None
    connected: bool = False
    """In one piece."""
    smiles: str = ""
    """Canonical, with the stereochemistry of the positions, without hydrogens that need not be written."""
    inchi: str = ""
    """Without its stereo layers; see `without_stereo`."""

    @property
    def valid(self) -> bool:
        return self.molecule is not None


def rdkit(module: str) -> Any:
    """A module of RDKit, such as "Chem".

    Raises:
        UserError: RDKit is not installed.
    """
    try:
        return importlib.import_module(f"rdkit.{module}")
    except ImportError as error:
        raise UserError("scores of molecules need RDKit: pip install 'unite-fast[molecules]'") from error


def atoms_of(molecules: MoleculeSet) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers [n] and positions float64 [n, 3] of each molecule, without pads."""
    for numbers, positions, size in zip(molecules.numbers, molecules.positions, molecules.sizes, strict=True):
        yield numbers[:size], positions[:size].astype(np.float64)


def is_sensible(numbers: np.ndarray, positions: np.ndarray) -> bool:
    """Whether atoms can be taken for a molecule: 1 to `MAX_ATOMS` of elements that exist, at finite positions not
    beyond `FARTHEST`. Others are invalid everywhere."""
    known = 0 < len(numbers) <= MAX_ATOMS and bool(((numbers > 0) & (numbers < 119)).all())
    return known and bool((np.abs(positions) <= FARTHEST).all())  # False for NaN


def connect(numbers: np.ndarray, positions: np.ndarray) -> Any:
    """An RDKit molecule with the bonds, all single, that RDKit's DetermineConnectivity finds by distance; None if the
    atoms make no sense: positions that are not finite or far away, no element, too many or no atoms."""
    if not is_sensible(numbers, positions):
        return None
    with rdkit("rdBase").BlockLogs():
        molecule = _atoms(numbers, positions)
        try:
            rdkit("Chem.rdDetermineBonds").DetermineConnectivity(molecule)
        except (ValueError, RuntimeError):
            return None
    return molecule


def graph(numbers: np.ndarray, positions: np.ndarray) -> frozenset[tuple[int, int]] | None:
    """Bonds of `connect`, as pairs of indices, the smaller first; None if the atoms make no sense."""
    molecule = connect(numbers, positions)
    if molecule is None:
        return None
    ends = ((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds())
    return frozenset((min(pair), max(pair)) for pair in ends)


def bonds_of(molecules: MoleculeSet) -> list[np.ndarray]:
    """The bonds of each molecule, for an .sdf; see `bond_table`."""
    return [bond_table(*atoms, perceive(*atoms)) for atoms in atoms_of(molecules)]


def bond_table(numbers: np.ndarray, positions: np.ndarray, perceived: Perceived) -> np.ndarray:
    """The bonds of a molecule, int64 [k, 3]: two atoms and the order. Orders are those of `perceived`, with aromatic
    rings as single and double bonds; in an invalid molecule all are 1, from `connect`."""
    chem = rdkit("Chem")
    molecule = perceived.molecule if perceived.valid else connect(numbers, positions)
    if perceived.valid:
        molecule = chem.Mol(molecule)
        chem.Kekulize(molecule, clearAromaticFlags=True)
    bonds = [] if molecule is None else molecule.GetBonds()
    rows = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), int(bond.GetBondTypeAsDouble())) for bond in bonds]
    return np.array(rows, np.int64).reshape(-1, 3)


def in_one_piece(molecule: Any) -> bool:
    """Whether the bonds of an RDKit molecule join all its atoms."""
    return len(rdkit("Chem").GetMolFrags(molecule)) == 1


def perceive(numbers: np.ndarray, positions: np.ndarray) -> Perceived:
    """The molecule that RDKit's DetermineBonds finds at charge 0, with charged atoms allowed, if it passes
    sanitisation (Kim and Kim, Bull. Korean Chem. Soc. 36, 1769, 2015). An atom by itself is none: RDKit leaves it as it
    is, and hydrogens that are not there would be counted."""
    if not is_sensible(numbers, positions) or len(numbers) == 1:
        return Perceived()
    chem = rdkit("Chem")
    with rdkit("rdBase").BlockLogs():
        molecule = _atoms(numbers, positions)
        try:
            rdkit("Chem.rdDetermineBonds").DetermineBonds(
                molecule, charge=0, allowChargedFragments=True, maxIterations=MAX_ITERATIONS
            )
            chem.SanitizeMol(molecule)
            return Perceived(molecule, in_one_piece(molecule), _smiles(molecule), _inchi(molecule))
        except (
            ValueError,
            RuntimeError,
        ):  # RDKit's errors of chemistry are ValueErrors, those of its limits RuntimeErrors
            return Perceived()


def edm_molecule(numbers: np.ndarray, positions: np.ndarray) -> Perceived:
    """The molecule of EDM's bond orders (`stability.bond_orders`), if it passes RDKit's sanitisation. An atom may have
    fewer bonds than its valence. As in EDM, the SMILES is that of the largest piece; there is no InChI."""
    if not (is_sensible(numbers, positions) and np.isin(numbers, _EDM_ELEMENTS).all()):
        return Perceived()
    orders = bond_orders(MoleculeSet.of(numbers[None], positions[None], [len(numbers)]))[0]
    chem = rdkit("Chem")
    kinds = (None, chem.BondType.SINGLE, chem.BondType.DOUBLE, chem.BondType.TRIPLE)
    with rdkit("rdBase").BlockLogs():
        molecule = _atoms(numbers, positions)
        for i, j in zip(*np.triu(orders).nonzero(), strict=True):
            molecule.AddBond(int(i), int(j), kinds[orders[i, j]])
        try:
            chem.SanitizeMol(molecule)
            pieces = chem.GetMolFrags(molecule, asMols=True)
            largest = max(pieces, key=lambda piece: piece.GetNumAtoms())
            return Perceived(molecule, len(pieces) == 1, _smiles(largest))
        except (ValueError, RuntimeError):
            return Perceived()


def without_stereo(inchi: str) -> str:
    """An InChI without its layers /b, /t, /m and /s. The InChI column of QM9 has none of them."""
    head, *layers = inchi.strip().split("/")
    return "/".join([head, *(layer for layer in layers if not layer.startswith(tuple(STEREO_LAYERS)))])


def _atoms(numbers: np.ndarray, positions: np.ndarray) -> Any:
    """An RDKit molecule of atoms without bonds, at these positions."""
    chem = rdkit("Chem")
    molecule = chem.RWMol()
    for number in numbers.tolist():
        molecule.AddAtom(chem.Atom(number))
    conformer = chem.Conformer(len(numbers))
    conformer.SetPositions(np.ascontiguousarray(positions, np.float64))
    molecule.AddConformer(conformer)
    return molecule


def _smiles(molecule: Any) -> str:
    chem = rdkit("Chem")
    return chem.MolToSmiles(chem.RemoveHs(molecule, sanitize=False))


def _inchi(molecule: Any) -> str:
    return without_stereo(rdkit("Chem").MolToInchi(molecule))
