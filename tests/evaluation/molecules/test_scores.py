"""Scores of typed molecules by hand, and those of QM9 as specified."""

import json

import numpy as np
import pytest

from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.errors import UserError
from unite_fast.evaluation.molecules.scores import GENERATION, RECONSTRUCTION, generation_scores, reconstruction_scores
from unite_fast.evaluation.molecules.stability import stable_molecules

pytest.importorskip("rdkit", reason="RDKit is not installed")

# Of the first 300 and 1,000 molecules, by the noise in Angstrom: equal graphs, equal InChI, mean distance, and stable
# molecules.
NOISED = {
    300: {
        0.01: (298, 287, 0.0161307, 266),
        0.02: (296, 287, 0.0322645, 229),
        0.04: (294, 282, 0.0646451, 59),
        0.08: (269, 260, 0.1289563, 0),
    },
    1000: {
        0.01: (997, 962, 0.0162016, 911),
        0.02: (993, 960, 0.0322210, 764),
        0.04: (972, 942, 0.0646836, 204),
        0.08: (909, 885, 0.1292789, 0),
    },
}
MIRRORED = {300: 1.5420838, 1000: 1.5469420}
TRUE = {
    300: {"molecules": 300, "atoms": 5_374, "valid": 287, "edm_valid": 292, "stable": 285, "stable_atoms": 5_338},
    1000: {"molecules": 1000, "atoms": 18_041, "valid": 962, "edm_valid": 979, "stable": 947, "stable_atoms": 17_909},
}


def test_typed_molecules_are_all_good(few):
    scores = generation_scores(few, ["InChI=1S/H2O/h1H2", "InChI=1S/CH4/h1H4/t1-"])
    assert {key: scores[key] for key in GENERATION} == {key: 1 for key in GENERATION} | {"novel": pytest.approx(4 / 6)}
    assert scores["sizes"] == {"3": 3, "5": 1, "6": 2}
    assert scores["elements"] == {"H": 14, "C": 6, "N": 1, "O": 4, "F": 1}
    assert scores["counts"] == {
        **{"molecules": 6, "atoms": 26, "finite": 6, "valid": 6, "valid_connected": 6, "distinct": 6},
        **{"unique_connected": 6, "edm_valid": 6},
    }


def test_each_failure_counts_where_it_belongs(few):
    # Water, water again, two waters far apart, methane without a hydrogen, methane with a position that is not finite.
    water, methane = few.take([0]), few.take([1])
    numbers, positions = np.zeros((5, 6), np.uint8), np.zeros((5, 6, 3), np.float32)
    for row in (0, 1, 2):
        numbers[row, :3], positions[row, :3] = water.numbers[0, :3], water.positions[0, :3]
    numbers[2, 3:], positions[2, 3:] = water.numbers[0, :3], water.positions[0, :3] + 8
    for row in (3, 4):
        numbers[row, :5], positions[row, :5] = methane.numbers[0, :5], methane.positions[0, :5]
    positions[4, 2, 1] = np.nan
    scores = generation_scores(MoleculeSet.of(numbers, positions, [3, 3, 6, 4, 5]), [])
    assert scores["counts"] == {
        **{"molecules": 5, "atoms": 21, "finite": 4, "valid": 3, "valid_connected": 2, "distinct": 2},
        **{"unique_connected": 1, "edm_valid": 4},
    }
    expected = {
        **{"valid_connected": 2 / 5, "valid": 3 / 5, "unique": 2 / 3, "novel": 1, "single_fragment": 3 / 5},
        **{"atom_stable": 15 / 21, "mol_stable": 3 / 5, "edm_valid": 4 / 5, "edm_connected": 3 / 5},
        # Of two waters EDM's SMILES is that of one.
        **{"edm_unique": 2 / 4, "edm_valid_unique": 2 / 5},
    }
    assert {key: scores[key] for key in GENERATION} == pytest.approx(expected)


def test_scores_can_be_saved_and_defined(few):
    scores = generation_scores(few)
    assert scores["novel"] is None and json.loads(json.dumps(scores)) == scores
    assert next(iter(scores)) == "valid_connected" and scores.keys() - GENERATION == {"counts", "sizes", "elements"}
    scores = reconstruction_scores(few, few)
    assert json.loads(json.dumps(scores)) == scores and scores.keys() - RECONSTRUCTION == {"counts"}


def test_of_nothing_there_are_no_shares():
    none = MoleculeSet.of(np.zeros((0, 5)), np.zeros((0, 5, 3)), [])
    for scores in (generation_scores(none, []), reconstruction_scores(none, none)):
        assert {value for value in scores.values() if not isinstance(value, dict)} == {None}


def test_progress_comes_in_batches(few):
    seen = []

    def track(batches, total, title):
        for batch in batches:
            seen.append((len(batch), total))
            yield batch

    many = few.take(np.arange(230) % 6)
    assert generation_scores(many, track=track)["counts"]["valid"] == 230
    assert seen == [(100, 3), (100, 3), (30, 3)]
    reconstruction_scores(many.take(range(50)), many.take(range(50)), track)
    assert seen[3:] == [(50, 1)]


def test_copies_that_are_wrong_count_as_wrong(few, mentions):
    copies = few.take(range(6))
    copies.positions[0] += 5
    copies.numbers[1, 4] = 9
    copies.positions[2, 2] *= 3
    copies.positions[3, 0, 0] = np.nan
    copies.positions[4] = few.positions[4] * [1, 1, -1]
    scores = reconstruction_scores(few, copies)
    assert scores["counts"] == {"molecules": 6, "finite": 5, "inchi": 6}
    assert (scores["elements"], scores["graph"], scores["inchi_rdkit"]) == pytest.approx((5 / 6, 3 / 6, 3 / 6))
    assert 0.1 < scores["rmsd"] < 0.5
    with pytest.raises(UserError, match=mentions(6, 4)):
        reconstruction_scores(few, few.take(range(4)))


def test_two_molecules_without_bonds_because_of_nan_do_not_agree(few):
    few.positions[0, 0, 0] = np.nan
    scores = reconstruction_scores(few.take([0]), few.take([0]))
    assert (scores["elements"], scores["graph"], scores["inchi_rdkit"], scores["rmsd"]) == (1, 0, None, None)


def test_bonds_are_compared_by_index(few):
    copies = few.take([1])
    copies.numbers[0, :2], copies.positions[0, :2] = copies.numbers[0, 1::-1], copies.positions[0, 1::-1]
    scores = reconstruction_scores(few.take([1]), copies)
    assert (scores["elements"], scores["graph"], scores["inchi_rdkit"]) == (0, 0, 1)
    copies.numbers[0, :2] = few.numbers[1, :2]
    scores = reconstruction_scores(few.take([1]), copies)
    assert (scores["elements"], scores["graph"]) == (1, 0)


def test_qm9_scores_as_specified(qm9, scored):
    molecules, expected = qm9.take(range(scored)), TRUE[scored]
    scores = generation_scores(molecules, qm9.inchi)
    counts = scores["counts"]
    assert {key: counts[key] for key in ("molecules", "atoms", "edm_valid")}.items() <= expected.items()
    assert {counts[key] for key in ("valid", "valid_connected", "distinct", "unique_connected")} == {expected["valid"]}
    assert scores["edm_unique"] == scores["single_fragment"] == 1 and scores["edm_connected"] == scores["edm_valid"]
    assert round(scores["mol_stable"] * scored) == expected["stable"]
    assert round(scores["atom_stable"] * expected["atoms"]) == expected["stable_atoms"]


def test_no_molecule_of_qm9_is_new_to_its_inchi(qm9):
    some = qm9.take(range(100))
    scores = generation_scores(some, some.inchi)
    assert scores["novel"] == 0
    others = qm9.take(range(2, 100)).inchi
    assert generation_scores(some, others)["novel"] == pytest.approx(2 / scores["counts"]["unique_connected"])


@pytest.mark.parametrize("deviation", [0.01, 0.02, 0.04, 0.08])
def test_noised_qm9_scores_as_specified(qm9, noised_qm9, scored, deviation):
    copies = noised_qm9[deviation].take(range(scored))
    scores = reconstruction_scores(qm9.take(range(scored)), copies)
    same_graph, same_inchi, rmsd, stable = NOISED[scored][deviation]
    assert scores["elements"] == 1 and scores["counts"]["inchi"] == TRUE[scored]["valid"]
    assert round(scores["graph"] * scored) == same_graph
    assert round(scores["inchi_rdkit"] * scores["counts"]["inchi"]) == same_inchi
    assert scores["rmsd"] == pytest.approx(rmsd, abs=1e-7)
    assert stable_molecules(copies).sum() == stable


def test_mirrored_qm9_has_the_same_graphs_at_a_distance(qm9, scored):
    molecules = qm9.take(range(scored))
    mirrored = qm9.take(range(scored))
    mirrored.positions = -mirrored.positions
    scores = reconstruction_scores(molecules, mirrored)
    assert scores["graph"] == scores["inchi_rdkit"] == 1
    assert scores["rmsd"] == pytest.approx(MIRRORED[scored], abs=1e-6)
