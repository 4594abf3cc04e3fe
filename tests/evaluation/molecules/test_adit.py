"""ADiT's protocol. With the packages of the extra `adit` on QM9 as specified; without them the messages."""

import numpy as np
import pytest

from unite_fast.errors import UserError
from unite_fast.evaluation.molecules import adit
from unite_fast.evaluation.molecules.perception import atoms_of

MATCHED = {0.01: 989, 0.02: 987, 0.04: 959, 0.08: 916}
"""Of 1,000, by the noise, Angstrom."""


@pytest.fixture
def openbabel():
    pytest.importorskip("openbabel", reason="Open Babel is not installed")


def test_a_missing_package_is_named_with_the_extra(monkeypatch, few):
    def missing(name):
        raise ImportError(name)

    adit._openbabel.cache_clear()
    monkeypatch.setattr(adit.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"openbabel.*\[molecules,adit\]"):
        adit.adit_scores(few, few)
    with pytest.raises(UserError, match=r"posebusters.*\[molecules,adit\]"):
        adit.posebusters_valid(few)


def test_typed_molecules_match_themselves(openbabel, few):
    assert [adit.openbabel_inchi(*atoms) for atoms in atoms_of(few)][:3] == [
        *("InChI=1S/H2O/h1H2", "InChI=1S/CH4/h1H4", "InChI=1S/CHN/c1-2/h1H")
    ]
    copies = few.take(range(6))
    copies.positions[0, 1], copies.positions[1, 0, 0], copies.numbers[3, 1] = 9, np.nan, 7
    scores = adit.adit_scores(few, copies)
    assert scores["counts"] == {"molecules": 6, "matched": 3}
    assert (scores["match_adit"], scores["rmsd_matched"]) == pytest.approx((0.5, 0), abs=1e-7)
    assert scores.keys() - adit.ADIT == {"counts"}


def test_noised_qm9_matches_as_specified(openbabel, qm9, noised_qm9):
    assert {s: adit.adit_scores(qm9, copies)["counts"]["matched"] for s, copies in noised_qm9.items()} == MATCHED
    mirrored = qm9.take(range(len(qm9)))
    mirrored.positions = -mirrored.positions
    assert adit.adit_scores(qm9, mirrored)["match_adit"] == 0.356


def test_posebusters_judges_the_geometry(few):
    pytest.importorskip("posebusters", reason="PoseBusters is not installed")
    molecules = few.take([4, 5, 0])
    molecules.positions[2, 1] = np.nan
    assert adit.posebusters_valid(molecules).tolist() == [True, True, False]
