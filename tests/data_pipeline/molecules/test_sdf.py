import os
import sys
import tracemalloc

import numpy as np
import pytest

from unite_fast.data_pipeline.molecules.frames import LeftOut
from unite_fast.data_pipeline.molecules.sdf import read_sdf, write_sdf
from unite_fast.data_pipeline.molecules.set_file import read_set
from unite_fast.errors import UserError

WATER = """water
  made    by hand   3D

  3  2  0  0  0  0  0  0  0  0999 V2000
    0.0000    0.0000    0.1000 O   0  0  0  0  0  0  0  0  0  0  0  0
    0.9600    0.0000    0.0000 H   0  0  0  0  0  0  0  0  0  0  0  0
   -0.2400    0.9300    0.0000 H   0  0  0  0  0  0  0  0  0  0  0  0
  1  2  1  0
  1  3  1  0
M  END
> <name>
water

$$$$
"""


@pytest.fixture
def read(tmp_path):
    """Reads a text: numbers in the file, molecules, and what was left out."""
    pytest.importorskip("rdkit")

    def run(text: str):
        path, left_out = tmp_path / "a.sdf", LeftOut()
        path.write_text(text)
        pairs = list(read_sdf(path, left_out))
        return [number for number, _ in pairs], [frame for _, frame in pairs], left_out

    return run


def test_several_molecules(read):
    numbers, frames, left_out = read(WATER * 2 + WATER.replace("$$$$\n", ""))
    assert numbers == [1, 2, 3] and left_out == LeftOut()
    assert frames[2].numbers.tolist() == [8, 1, 1]
    assert frames[2].positions.tolist() == [[0, 0, 0.1], [0.96, 0, 0], [-0.24, 0.93, 0]]


def test_a_mol_block_of_version_3000(read):
    from rdkit import Chem

    molecule = Chem.MolFromMolBlock(WATER.split("> <")[0], sanitize=False, removeHs=False)
    numbers, frames, _ = read(Chem.MolToV3KMolBlock(molecule) + "$$$$\n")
    assert numbers == [1] and frames[0].numbers.tolist() == [8, 1, 1]
    assert frames[0].positions.tolist() == [[0, 0, 0.1], [0.96, 0, 0], [-0.24, 0.93, 0]]


def test_impossible_valences_are_read(read):
    assert read(WATER.replace("  1  2  1", "  1  2  3"))[0] == [1]


@pytest.mark.parametrize(
    ("old", "new", "tokens"),
    [
        ("  3  2  0", "  9  2  0", ""),
        ("  3  2  0", "  0  0  0", "no atoms"),
        ("  3  2  0", "257  2  0", "257"),
        ("  3  2  0", "  x  2  0", ""),
        (" H ", " Q ", "element"),
        (" H ", " Xy", ""),
        (" H ", " R#", "element"),
        ("    0.9600", "       nan", ""),
        ("    0.9600", "       inf", ""),
        ("    0.9600", "1e99999999", ""),
        ("   -0.2400    0.9300", "    0.9600    0.0500", "duplicate atoms"),
        ("  1  3  1", "  1  9  1", ""),
        (WATER[:-5], "", "no connection table"),
        (WATER[:-5], "\n\n\n", "no connection table"),
        ("  made    by hand   3D", "  made    by hand   2D", ""),
    ],
)
def test_a_broken_molecule_is_named_and_the_next_is_read(read, capfd, old, new, tokens):
    broken = WATER.replace(old, new)
    if "2D" in new:
        broken, tokens = broken.replace("    0.1000", "    0.0000"), "2D"
    numbers, frames, left_out = read(WATER + broken + WATER)
    assert numbers == [1, 3] and frames[1].numbers.tolist() == [8, 1, 1]
    assert left_out.broken == 1 and "a.sdf, molecule 2: " in left_out.examples[0] and tokens in left_out.examples[0]
    assert capfd.readouterr() == ("", "")


def test_a_table_that_is_too_long_is_broken(tmp_path):
    pytest.importorskip("rdkit")
    long = WATER.replace("  1  2  1  0\n", f"{'x' * 60_000}\n" * 500)
    (tmp_path / "a.sdf").write_text(WATER + long + WATER)
    left_out = LeftOut()
    tracemalloc.start()
    numbers = [number for number, _ in read_sdf(tmp_path / "a.sdf", left_out)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (numbers, left_out.broken) == ([1, 3], 1)
    assert peak < 15_000_000  # the table has 30 MB


@pytest.mark.parametrize("text", ["", "\n\n", "text\n", WATER.replace(" O ", " Q ")])
def test_a_file_without_a_good_molecule_is_an_error(read, text):
    with pytest.raises(UserError, match=r"a\.sdf"):
        read(text)


def test_without_rdkit_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    (tmp_path / "a.sdf").write_text(WATER)
    with pytest.raises(UserError, match=r"a\.sdf.*unite-fast\[molecules\]"):
        list(read_sdf(tmp_path / "a.sdf", LeftOut()))


def test_what_is_written_is_read_again(tmp_path, qm9_200):
    pytest.importorskip("rdkit")
    molecules = read_set(qm9_200)
    write_sdf(tmp_path / "a.sdf", molecules)
    frames = [frame for _, frame in read_sdf(tmp_path / "a.sdf", LeftOut())]
    assert len(frames) == 200
    for row, frame in enumerate(frames):
        size = molecules.sizes[row]
        assert np.array_equal(frame.numbers, molecules.numbers[row, :size])
        # Four digits after the point.
        assert np.abs(frame.positions - molecules.positions[row, :size]).max() <= 0.5e-4 + 1e-12


def test_rdkit_reads_title_and_bonds(tmp_path, make_set):
    Chem = pytest.importorskip("rdkit.Chem")
    molecules = make_set("HCN", "HH", "C")
    molecules.positions[0] *= -600
    molecules.index[:] = [7, 8, 9]
    write_sdf(tmp_path / "a.sdf", molecules, [[[0, 1, 1], [2, 1, 3]], np.array([[0, 1, 4]]), []])
    first, second, third = Chem.SDMolSupplier(str(tmp_path / "a.sdf"), removeHs=False, sanitize=False)
    bonds = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), str(bond.GetBondType())) for bond in first.GetBonds()]
    assert bonds == [(0, 1, "SINGLE"), (2, 1, "TRIPLE")]
    assert str(second.GetBondWithIdx(0).GetBondType()) == "AROMATIC" and third.GetNumBonds() == 0
    assert [molecule.GetProp("_Name") for molecule in (first, second, third)] == ["7", "8", "9"]
    assert first.GetConformer().GetPositions().tolist() == [[900, 0, 0], [0, 0, 0], [-900, 0, 0]]
    assert first.GetConformer().Is3D()


@pytest.mark.parametrize("bonds", [[], [[[0, 3, 1]]], [[[-1, 0, 1]]], [[[0, 0, 1]]], [[[0, 1, 5]]], [[[0, 1, 0]]]])
def test_what_is_no_bond_is_refused(tmp_path, make_set, bonds):
    with pytest.raises(UserError):
        write_sdf(tmp_path / "a.sdf", make_set("HHO"), bonds)
    assert os.listdir(tmp_path) == []


def test_what_the_format_cannot_hold_is_refused(tmp_path, make_set):
    molecules = make_set("HHO")
    molecules.positions[0, 0, 0] = 20_000
    with pytest.raises(UserError, match="molecule 0"):
        write_sdf(tmp_path / "a.sdf", molecules)
    with pytest.raises(UserError, match="molecule 0"):
        write_sdf(tmp_path / "a.sdf", make_set("HHO"), [[[0, 1, 1]] * 1000])
