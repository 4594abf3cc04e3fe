"""Which published scores may stand beside ours."""

from unite_fast.evaluation.molecules.adit import ADIT
from unite_fast.evaluation.molecules.published import PUBLISHED, comparable
from unite_fast.evaluation.molecules.scores import GENERATION


def test_every_key_is_a_score_of_ours():
    keys = {row.key for row in PUBLISHED}
    assert keys - {None} <= GENERATION.keys() | ADIT.keys() and {None, "edm_valid", "match_adit"} < keys


def test_only_scores_of_the_same_protocol_are_comparable():
    ours = {"edm_valid": 0.5, "edm_valid_unique": None, "valid": 0.9, "unique": 1.0, "rmsd": 0.1}
    assert [(row.model, row.value) for row in comparable(ours)] == [("EDM", 0.919), ("GeoLDM", 0.938)]
    assert [(row.model, row.value) for row in comparable({"rmsd_matched": 0.01})] == [
        *(("UNITE-S", 0.039), ("ADiT tokenizer", 0.075))
    ]
    assert comparable({}) == []


def test_values_are_shares_except_distances():
    assert all(0.9 < row.value < 1 for row in PUBLISHED if not row.unit)
    assert {row.score for row in PUBLISHED if row.unit} == {"RMSD"}
