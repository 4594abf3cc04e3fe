"""Scores of reconstructed and of generated molecules. All shares are fractions from 0 to 1, or None of nothing."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from unite_fast.data_pipeline.molecules.elements import SYMBOLS
from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.evaluation.molecules.alignment import check_same_sizes, rmsd_of_sets
from unite_fast.evaluation.molecules.perception import (
    atoms_of,
    connect,
    edm_molecule,
    graph,
    in_one_piece,
    perceive,
    without_stereo,
)
from unite_fast.evaluation.molecules.stability import finite_molecules, stable_atoms, stable_molecules
from unite_fast.utils.progress import Track, no_progress

RECONSTRUCTION = {
    "elements": "share of molecules all of whose elements are right",
    "rmsd": "root mean square distance of the atoms, in their order, after the best proper rotation, Angstrom; mean "
    "over the molecules with finite positions (counts.finite)",
    "graph": "share of molecules whose elements are right and whose bonds by distance (RDKit DetermineConnectivity) "
    "are those of the truth, by index",
    "inchi_rdkit": "share with the truth's InChI without stereo layers (RDKit DetermineBonds), among the molecules "
    "whose truth has one (counts.inchi)",
}
"""Definition of each score of `reconstruction_scores`."""
GENERATION = {
    "valid_connected": "share of molecules that are valid and in one piece",
    "valid": "share of molecules to which RDKit's DetermineBonds gives bonds at charge 0, charged atoms allowed, and "
    "that pass sanitisation; says little alone, because loose atoms can be valid",
    "unique": "distinct SMILES per valid molecule",
    "novel": "share of the distinct SMILES of valid connected molecules (counts.unique_connected) whose InChI without "
    "stereo layers is not known from the training split",
    "atom_stable": "share of atoms whose bond orders by EDM's table of lengths sum to the valence H1 C4 N3 O2 F1",
    "mol_stable": "share of molecules all of whose atoms are stable",
    "edm_valid": "share of molecules that pass RDKit's sanitisation with EDM's bond orders",
    "edm_unique": "distinct SMILES, of the largest piece, per molecule that is edm_valid",
    "edm_valid_unique": "edm_valid x edm_unique, which EDM and GeoLDM call unique",
    "edm_connected": "share of molecules that are edm_valid and in one piece",
    "single_fragment": "share of molecules that bonds by distance (RDKit DetermineConnectivity) join to one piece",
}
"""Definition of each score of `generation_scores`."""
_BATCH = 100
"""Molecules between two reports of progress."""


def reconstruction_scores(truth: MoleculeSet, copies: MoleculeSet, track: Track = no_progress) -> dict:
    """Scores of reconstructed molecules against the truth, in the same order of molecules and atoms.

    Returns:
        The scores of `RECONSTRUCTION`, and `counts`: `molecules`, `finite` and `inchi`, of which they are means. A
        molecule with a position that is not finite is wrong in `graph` and `inchi_rdkit`.

    Raises:
        UserError: sets of different sizes; RDKit is not installed.
    """
    check_same_sizes(truth, copies)
    elements = same_elements(truth, copies)
    rmsd = rmsd_of_sets(truth, copies)
    rmsd = rmsd[np.isfinite(rmsd)]
    same_graph, has_inchi, same_inchi = 0, 0, 0
    pairs = zip(atoms_of(truth), atoms_of(copies), elements, strict=True)
    for original, copy, right in tracked(pairs, len(truth), track, "comparing molecules"):
        bonds = graph(*original) if right else None
        same_graph += bonds is not None and bonds == graph(*copy)
        if inchi := perceive(*original).inchi:
            has_inchi += 1
            same_inchi += inchi == perceive(*copy).inchi
    return {
        "elements": _share(elements.sum(), len(truth)),
        "rmsd": float(rmsd.mean()) if len(rmsd) else None,
        "graph": _share(same_graph, len(truth)),
        "inchi_rdkit": _share(same_inchi, has_inchi),
        "counts": {"molecules": len(truth), "finite": len(rmsd), "inchi": has_inchi},
    }


def tracked(molecules: Iterable, count: int, track: Track, title: str) -> Iterator:
    """The same molecules; progress is shown by batches."""
    rest, batches = iter(molecules), -(-count // _BATCH)
    for batch in track((list(islice(rest, _BATCH)) for _ in range(batches)), batches, title):
        yield from batch


def same_elements(truth: MoleculeSet, copies: MoleculeSet) -> np.ndarray:
    """Molecules all of whose elements agree, pads apart: bool [m]."""
    width = int(truth.sizes.max(initial=0))
    pads = np.arange(width) >= truth.sizes[:, None]
    return np.all((truth.numbers[:, :width] == copies.numbers[:, :width]) | pads, axis=1)


def generation_scores(
    molecules: MoleculeSet, known_inchi: Collection[str] | None = None, track: Track = no_progress
) -> dict:
    """Scores of generated molecules. One with a position that is not finite is invalid and has no stable atom.

    Args:
        known_inchi: InChI of the training split; their stereo layers do not count. None: no `novel`.

    Returns:
        The scores of `GENERATION`, and
        `counts`: `molecules`, `atoms`, `finite`, `valid`, `valid_connected`, `distinct` SMILES, `unique_connected`,
            `edm_valid`;
        `sizes` and `elements`: how many molecules have so many atoms, and how many atoms are of an element, by name.

    Raises:
        UserError: RDKit is not installed.
    """
    atoms = stable_atoms(molecules)
    found = _Found()
    for numbers, positions in tracked(atoms_of(molecules), len(molecules), track, "scoring molecules"):
        found.add(numbers, positions)
    m, total = len(molecules), int(molecules.sizes.sum())
    valid, edm_valid = found.smiles.total(), found.edm_smiles.total()
    return {
        "valid_connected": _share(found.connected, m),
        "valid": _share(valid, m),
        "unique": _share(len(found.smiles), valid),
        "novel": None if known_inchi is None else _novel(found.inchi.values(), known_inchi),
        "atom_stable": _share(atoms.sum(), total),
        "mol_stable": _share(stable_molecules(molecules, atoms).sum(), m),
        "edm_valid": _share(edm_valid, m),
        "edm_unique": _share(len(found.edm_smiles), edm_valid),
        "edm_valid_unique": _share(len(found.edm_smiles), m),
        "edm_connected": _share(found.edm_connected, m),
        "single_fragment": _share(found.single_fragment, m),
        "counts": {
            "molecules": m,
            "atoms": total,
            "finite": int(finite_molecules(molecules).sum()),
            "valid": valid,
            "valid_connected": found.connected,
            "distinct": len(found.smiles),
            "unique_connected": len(found.inchi),
            "edm_valid": edm_valid,
        },
        "sizes": {str(size): count for size, count in sorted(Counter(molecules.sizes.tolist()).items())},
        "elements": _elements(molecules),
    }


@dataclass
class _Found:
    """What was perceived of the molecules so far."""

    smiles: Counter[str] = field(default_factory=Counter)
    """Of valid molecules."""
    inchi: dict[str, str] = field(default_factory=dict)
    """Of valid connected molecules, by SMILES."""
    edm_smiles: Counter[str] = field(default_factory=Counter)
    connected: int = 0
    edm_connected: int = 0
    single_fragment: int = 0

    def add(self, numbers: np.ndarray, positions: np.ndarray) -> None:
        by_distance = connect(numbers, positions)
        self.single_fragment += by_distance is not None and in_one_piece(by_distance)
        molecule = perceive(numbers, positions)
        if molecule.valid:
            self.smiles[molecule.smiles] += 1
        if molecule.connected:
            self.connected += 1
            self.inchi[molecule.smiles] = molecule.inchi
        edm = edm_molecule(numbers, positions)
        if edm.valid:
            self.edm_smiles[edm.smiles] += 1
        self.edm_connected += edm.connected


def _novel(inchi: Collection[str], known: Collection[str]) -> float | None:
    # One without an InChI cannot be told to be new.
    known = {without_stereo(name) for name in known} | {""}
    return _share(sum(name not in known for name in inchi), len(inchi))


def _elements(molecules: MoleculeSet) -> dict[str, int]:
    """Atoms of each element that occurs, by symbol; numbers that no element has count as "?"."""
    real = np.arange(molecules.numbers.shape[1]) < molecules.sizes[:, None]
    counts = Counter[str]()
    for number, count in enumerate(np.bincount(molecules.numbers[real]).tolist()):
        if count:
            counts[(SYMBOLS[number] if number < len(SYMBOLS) else "") or "?"] += count
    return dict(counts)


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None
