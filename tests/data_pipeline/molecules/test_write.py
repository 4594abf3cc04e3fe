"""A file of molecules by the end of its name."""

import numpy as np
import pytest

from unite_fast.data_pipeline.molecules.import_files import import_files
from unite_fast.data_pipeline.molecules.set_file import read_set
from unite_fast.data_pipeline.molecules.write import MOLECULE_FILES, write_molecules
from unite_fast.errors import UserError


@pytest.mark.parametrize("suffix", MOLECULE_FILES)
def test_every_kind_is_read_back(suffix, make_set, tmp_path):
    if suffix == ".sdf":
        pytest.importorskip("rdkit")
    written = make_set("CHHHH", "OH", "NNO")
    path = tmp_path / f"new{suffix}"
    write_molecules(path, written)
    read, left_out = import_files([path])
    assert (len(read), left_out.broken) == (3, 0)
    assert read.sizes.tolist() == [5, 2, 3] and (read.numbers == written.numbers).all()
    np.testing.assert_allclose(read.positions, written.positions, atol=1e-4)


def test_a_suffix_given_apart_decides(make_set, tmp_path):
    """As the parts of a generation are written: to NAME.npz.partial."""
    write_molecules(tmp_path / "out.xyz.partial", make_set("OHH"), ".xyz")
    assert (tmp_path / "out.xyz.partial").read_text().startswith("3\n")
    write_molecules(tmp_path / "out.xyz", make_set("OHH"), ".npz")
    assert len(read_set(tmp_path / "out.xyz")) == 1


def test_bonds_are_asked_for_an_sdf_alone(make_set, tmp_path):
    asked = []

    def bonds(molecules):
        asked.append(len(molecules))
        return [np.array([[0, 1, 2]]), np.zeros((0, 3), np.int64)]

    for suffix in MOLECULE_FILES:
        write_molecules(tmp_path / f"a{suffix}", make_set("CO", "HH"), bonds=bonds)
    assert asked == [2]
    blocks = (tmp_path / "a.sdf").read_text().split("$$$$")
    assert "  1  2  2" in blocks[0] and "  1  2" not in blocks[1].split("V2000")[1]
    write_molecules(tmp_path / "none.sdf", make_set("CO"))
    assert "  1  2" not in (tmp_path / "none.sdf").read_text().split("V2000")[1]


def test_a_folder_that_cannot_be_written_is_an_error_and_leaves_nothing(make_set, tmp_path):
    (tmp_path / "file").touch()
    for suffix in MOLECULE_FILES:
        with pytest.raises(UserError, match=str(tmp_path / "file")):
            write_molecules(tmp_path / "file" / f"a{suffix}", make_set("CO"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
