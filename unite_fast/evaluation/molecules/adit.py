"""Scores as in ADiT (arXiv 2503.03965): bonds and InChI by Open Babel, plausible geometry by PoseBusters.

Both are optional and slow to install; nothing else imports this file's packages.
"""

import importlib
import logging
from functools import cache
from typing import Any

import numpy as np

from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.errors import UserError
from unite_fast.evaluation.molecules.alignment import check_same_sizes, rmsd_of_sets
from unite_fast.evaluation.molecules.perception import atoms_of, is_sensible, perceive
from unite_fast.evaluation.molecules.scores import tracked
from unite_fast.utils.progress import Track, no_progress

ADIT = {
    "match_adit": "share of molecules with the InChI of the truth, stereo layers included, by Open Babel "
    "(ConnectTheDots, PerceiveBondOrders)",
    "rmsd_matched": "mean of rmsd over the molecules that match (counts.matched), Angstrom",
}
"""Definition of each score of `adit_scores`."""


def adit_scores(truth: MoleculeSet, copies: MoleculeSet, track: Track = no_progress) -> dict:
    """Scores of reconstructed molecules against the truth, in the same order of molecules and atoms: those of `ADIT`,
    and `counts`, `molecules` and `matched`, of which they are means. The distance is that of atoms of the same index.

    Raises:
        UserError: sets of different sizes; Open Babel is not installed.
    """
    check_same_sizes(truth, copies)
    matched = np.zeros(len(truth), bool)
    pairs = zip(atoms_of(truth), atoms_of(copies), strict=True)
    for i, (original, copy) in enumerate(tracked(pairs, len(truth), track, "comparing InChI")):
        inchi = openbabel_inchi(*original)
        matched[i] = inchi != "" and inchi == openbabel_inchi(*copy)
    rmsd = rmsd_of_sets(truth.take(matched), copies.take(matched))
    return {
        "match_adit": float(matched.mean()) if len(truth) else None,
        "rmsd_matched": float(rmsd.mean()) if matched.any() else None,
        "counts": {"molecules": len(truth), "matched": int(matched.sum())},
    }


def openbabel_inchi(numbers: np.ndarray, positions: np.ndarray) -> str:
    """InChI of one molecule by Open Babel, with stereo layers; empty if the atoms make no sense.

    Args:
        numbers: atomic numbers, integers [n].
        positions: [n, 3], Angstrom.

    Raises:
        UserError: Open Babel is not installed.
    """
    openbabel, writer = _openbabel()
    if not is_sensible(numbers, positions):
        return ""
    molecule = openbabel.OBMol()
    molecule.BeginModify()
    for number, position in zip(numbers.tolist(), positions.astype(np.float64).tolist(), strict=True):
        atom = molecule.NewAtom()
        atom.SetAtomicNum(number)
        atom.SetVector(*position)
    molecule.EndModify()
    molecule.ConnectTheDots()
    molecule.PerceiveBondOrders()
    return writer.WriteString(molecule).strip()


def posebusters_valid(molecules: MoleculeSet, track: Track = no_progress) -> np.ndarray:
    """Molecules that `perceive` finds valid and that pass all checks of PoseBusters for a molecule by itself
    (Buttenschoen et al., arXiv 2308.05777): bool [m]. A second or more a molecule.

    Raises:
        UserError: PoseBusters is not installed.
    """
    logging.getLogger("posebusters").setLevel(logging.CRITICAL)
    busters = _load("posebusters").PoseBusters(config="mol")
    passed = np.zeros(len(molecules), bool)
    for i, atoms in enumerate(track(atoms_of(molecules), len(molecules), "busting poses")):
        molecule = perceive(*atoms).molecule
        if molecule is not None:
            passed[i] = bool(busters.bust([molecule]).to_numpy(bool).all())
    return passed


@cache
def _openbabel() -> tuple[Any, Any]:
    """Open Babel, silent, and its writer of InChI."""
    openbabel = _load("openbabel.openbabel")
    openbabel.obErrorLog.StopLogging()
    writer = openbabel.OBConversion()
    writer.SetOutFormat("inchi")
    return openbabel, writer


def _load(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"ADiT's scores need {module.partition('.')[0]}: pip install 'unite-fast[molecules,adit]'"
        ) from error
