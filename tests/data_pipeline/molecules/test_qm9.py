"""The numbers of QM9. The tests that read it (8 s) need qm9pack: pip install 'unite-fast[molecules]'."""

import importlib.util
import sys

import numpy as np
import pytest

from unite_fast.data_pipeline.molecules import qm9
from unite_fast.data_pipeline.molecules.elements import SYMBOLS
from unite_fast.data_pipeline.molecules.set_file import read_set, write_set
from unite_fast.errors import UserError


@pytest.fixture(scope="module")
def molecules():
    if importlib.util.find_spec("qm9pack") is None:
        pytest.skip("qm9pack is not installed")
    return qm9.import_qm9()


def take_200(molecules):
    """The molecules of tests/data/qm9_200.npz: the first 140 training, 30 validation and 30 test molecules in the order
    of QM9's permutation. To make the file again: write_set("tests/data/qm9_200.npz", take_200(import_qm9()))."""
    order = qm9.permute_qm9()
    starts = {0: 140, qm9.TRAINING: 30, qm9.TRAINING + qm9.VALIDATING: 30}
    return molecules.take(np.concatenate([order[start : start + count] for start, count in starts.items()]))


def test_the_permutation_begins_as_stated():
    assert qm9.permute_qm9()[:5].tolist() == [130195, 68784, 7957, 25911, 20168]
    assert np.bincount(qm9.split_qm9()).tolist() == [100_000, 17_748, 13_083]
    assert qm9.split_qm9()[[130195, 68784]].tolist() == [0, 0]


def test_another_permutation_is_an_error(monkeypatch):
    other = np.random.default_rng(0)
    monkeypatch.setattr(np.random, "RandomState", lambda seed: other)
    with pytest.raises(UserError, match="numpy"):
        qm9.split_qm9()


def test_the_sizes_of_training_add_up():
    assert len(qm9.TRAIN_SIZES) == 30 and sum(qm9.TRAIN_SIZES) == 100_000
    assert round(np.dot(qm9.TRAIN_SIZES, np.arange(30)) / 100_000, 2) == 18.03


def test_qm9_has_its_numbers(molecules):
    assert len(molecules) == len(molecules.smiles) == len(molecules.inchi) == 130_831
    assert (molecules.index[0], molecules.index[-1], molecules.smiles[0]) == (1, 133_885, "C")
    assert molecules.numbers[0, :6].tolist() == [6, 1, 1, 1, 1, 0]
    train = molecules.numbers[molecules.split == 0]
    counts = {SYMBOLS[number]: int((train == number).sum()) for number in (1, 6, 7, 8, 9)}
    assert counts == {"H": 923_537, "C": 635_559, "N": 101_476, "O": 140_202, "F": 2_323}
    heavy = {most: molecules.heavy <= most for most in (6, 7, 8)}
    assert [(rows.sum(), *np.bincount(molecules.split[rows])[:2]) for rows in heavy.values()] == [
        *((783, 605, 105), (3_921, 3_009, 533), (21_800, 16_634, 2_937))
    ]


def test_qm9_is_centred(molecules):
    means = molecules.positions.astype(np.float64).sum(1) / molecules.sizes[:, None]
    # float32 of numbers up to 7.4 is exact to 2.4e-7 (half a unit in the last place), and so is their mean.
    assert np.abs(means).max() < 2.4e-7


def test_the_importer_does_not_import_the_package(molecules):
    assert "qm9pack" not in sys.modules


def test_other_contents_are_an_error(molecules):
    numbers = molecules.numbers.copy()
    numbers[0, 0] = 7
    for name, value in (("numbers", numbers), ("positions", molecules.positions * 1.0003)):
        with pytest.raises(UserError, match=r"qm9pack.*1\.0\.3"):
            qm9.check_contents(type(molecules)(**(vars(molecules) | {name: value})))


def test_the_fixture_is_what_its_function_makes(molecules, qm9_200, tmp_path):
    write_set(tmp_path / "a.npz", take_200(molecules))
    assert (tmp_path / "a.npz").read_bytes() == qm9_200.read_bytes()


def test_the_fixture_is_small(qm9_200):
    molecules = read_set(qm9_200)
    assert qm9_200.stat().st_size < 120_000
    assert np.bincount(molecules.split).tolist() == [140, 30, 30]
    assert molecules.index[:3].tolist() == [133_161, 70_467, 8_226]
    assert all(name.startswith("InChI=1S/") for name in molecules.inchi) and all(molecules.smiles)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'unite-fast\[molecules\]'"):
        qm9.import_qm9()


HEADER = "Index,SMILES,InChi,Elements,XYZ_Ang\n"
METHANE = """1,C,i,"['C','H']","[[0.,0,0],[1.,0,.5]]"\n"""


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (None, r"qm9_part1\.csv"),
        ("", r"qm9_part1\.csv"),
        ("Index,SMILES\n1,C\n", r"qm9_part1\.csv.*Inchi"),
        (HEADER + METHANE + METHANE.replace("'H'", "'Q'"), r"qm9_part1\.csv, line 3"),
        (HEADER + METHANE.replace("1.,0,.5", "1.,0"), r"qm9_part1\.csv, line 2.*5 coordinates"),
        (HEADER + METHANE.replace(".5", "nan"), r"qm9_part1\.csv, line 2"),
        (HEADER + METHANE.replace(".5", "x"), r"qm9_part1\.csv, line 2"),
        (HEADER + METHANE, "has 3 molecules"),
    ],
)
def test_another_package_of_this_name_is_one_line(monkeypatch, tmp_path, text, tokens):
    (tmp_path / "qm9pack" / "data").mkdir(parents=True)
    if text is not None:
        for name in qm9.FILES:
            (tmp_path / "qm9pack" / "data" / name).write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=f"(?i){tokens}"):
        qm9.import_qm9()
