"""Files and lines of an evaluation of molecules: each number beside its name and beside that of the truth."""

import copy
import json
import re

import numpy as np
import pytest
from PIL import Image

from unite_fast.errors import UserError
from unite_fast.evaluation.batches import HELD_OUT
from unite_fast.evaluation.molecules import report
from unite_fast.evaluation.molecules.published import PUBLISHED
from unite_fast.evaluation.molecules.scores import GENERATION, RECONSTRUCTION

# All different, so that a swap shows.
MADE = {name: 0.01 * (number + 1) for number, name in enumerate(GENERATION)}
TRUE = {name: 0.01 * (number + 41) for number, name in enumerate(GENERATION)}
REBUILT = {name: 0.01 * (number + 71) for number, name in enumerate(RECONSTRUCTION)}


@pytest.fixture
def result() -> dict:
    return copy.deepcopy(
        {
            "checkpoint": {"name": "a|b", "step": 12, "weights": "EMA", "weights_sha256": "abc"},
            "reconstruction": {"kind": HELD_OUT, "counts": {"molecules": 333}, **REBUILT},
            "generated": {
                "solver": "heun",
                "steps": 15,
                "counts": {"molecules": 222},
                "sizes": {"9": 3, "11": 4},
                "elements": {"H": 5},
                **MADE,
            },
            "true": {
                "kind": HELD_OUT,
                "counts": {"molecules": 111},
                "sizes": {"9": 6, "10": 7},
                "elements": {"H": 8, "C": 9},
                **TRUE,
            },
        }
    )


def row_of(table: str, first: str) -> list[str]:
    """The first row that begins so: the header of the last table has the name of a score, elements."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    return next(row for row in rows if row[0] == first)


def test_the_table_has_every_score_beside_that_of_the_truth(result):
    table = report.table(result)
    for name in GENERATION:
        assert row_of(table, name)[1:] == [f"{MADE[name]:.2%}", f"{TRUE[name]:.2%}", GENERATION[name]]
    for name in RECONSTRUCTION:
        value = f"{REBUILT[name]:.3f} A" if name == "rmsd" else f"{REBUILT[name]:.2%}"
        assert row_of(table, name)[1:] == [value, RECONSTRUCTION[name]]
    assert row_of(table, "9")[1:] == ["3", "6"] and row_of(table, "10")[1:] == ["0", "7"]
    assert row_of(table, "11")[1:] == ["4", "0"] and row_of(table, "C")[1:] == ["0", "9"]
    assert table.index("| 9 ") < table.index("| 10 "), "sizes in the order of numbers"
    assert "222 generated molecules (heun, 15 steps)" in table and "111 held-out molecules" in table
    assert table.startswith("# Evaluation of ") and "step 12" in table and "image" not in table


def test_published_scores_stand_beside_ours_of_the_same_protocol(result):
    table = report.table(result)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    expected = {(one.model, one.score): f"{MADE[one.key]:.2%}" for one in PUBLISHED if one.key in MADE}
    assert expected and {tuple(row[:2]): row[3] for row in rows if tuple(row[:2]) in expected} == expected
    assert "UNITE-S" not in table, "its validity is another"
    for key in ("edm_valid", "edm_valid_unique"):
        result["generated"][key] = None
    assert "| GeoLDM |" not in report.table(result)


def test_lines_begin_with_the_reconstruction_and_then_valid_connected(result, mentions):
    lines = report.lines(result)
    assert re.search(mentions(333, "held-out molecules", "elements 71.00%", "rmsd 0.720 A"), lines[0])
    assert re.search(mentions(222, 111), lines[1])
    assert [line.split()[0] for line in lines[2:]] == list(GENERATION) and lines[2].split()[0] == "valid_connected"
    assert lines[2].split()[1:] == ["1.00%", "41.00%"]
    result["reconstruction"] = None
    assert len(report.lines(result)) == len(lines) - 1


def test_what_is_not_known_is_a_dash(result):
    result["generated"]["novel"] = None
    assert report.number("novel", None) == "-"
    assert row_of(report.table(result), "novel")[1:3] == ["-", f"{TRUE['novel']:.2%}"]
    assert any(line.split() == ["novel", "-", f"{TRUE['novel']:.2%}"] for line in report.lines(result))


def test_files_are_those_that_report_folder_knows(result, few, tmp_path):
    pytest.importorskip("rdkit")
    out = tmp_path / "new" / "folder"
    report.save(result, few, (few, few.take(np.arange(len(few)))), out)
    assert sorted(path.name for path in out.iterdir()) == sorted(report.FILES)
    for name, beginning in report.FILES.items():
        assert (out / name).read_bytes().startswith(beginning)
    assert json.loads((out / "evaluation.json").read_text()) == result
    assert (out / "evaluation.md").read_text() == report.table(result)
    assert Image.open(out / "reconstructions.png").height > Image.open(out / "samples.png").height


def test_a_folder_that_cannot_be_made_is_one_line(result, few, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        report.save(result, few, None, tmp_path / "file" / "out")
