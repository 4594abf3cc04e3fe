"""Molecule sets, XYZ and SDF files."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from unite_fast.data_pipeline.molecules.import_files import import_files
from unite_fast.data_pipeline.molecules.molecule_set import MOST_ATOMS, MoleculeSet
from unite_fast.data_pipeline.molecules.set_file import read_set
from unite_fast.data_pipeline.molecules.write import MOLECULE_FILES, write_molecules

pytestmark = pytest.mark.usefixtures("slow_inputs")

DATA = Path(__file__).parents[1] / "data" / "qm9_200.npz"


@pytest.fixture(scope="session")
def molecule_files(tmp_path_factory) -> dict[str, bytes]:
    folder, contents = tmp_path_factory.mktemp("molecule_files"), {}
    for suffix in MOLECULE_FILES:
        write_molecules(folder / f"few{suffix}", read_set(DATA).take(range(6)))
        contents[suffix] = (folder / f"few{suffix}").read_bytes()
    return contents


def check(molecules: MoleculeSet) -> None:
    """Whatever a reader accepts is a set of molecules."""
    atoms = np.arange(molecules.numbers.shape[1]) < molecules.sizes[:, None]
    assert len(molecules) and (molecules.sizes >= 1).all() and (molecules.sizes <= MOST_ATOMS).all()
    assert ((molecules.numbers > 0) == atoms).all() and (molecules.numbers <= 118).all()
    assert np.isfinite(molecules.positions).all() and (molecules.positions[~atoms] == 0).all()
    assert (molecules.split <= 2).all()


@pytest.mark.parametrize("suffix", MOLECULE_FILES)
def test_damaged_files_of_molecules(suffix, fuzz, molecule_files):
    if suffix == ".sdf":
        pytest.importorskip("rdkit")

    def one(draw, folder):
        path = folder / f"few{suffix}"
        path.write_bytes(draw(fuzz.damaged(molecule_files[suffix])))
        if suffix == ".npz":
            check(read_set(path))
        check(import_files([path])[0])

    fuzz(f"molecules, {suffix}", one)


def test_crafted_xyz(fuzz):
    """Counts, properties and atoms of any kind."""
    word = st.sampled_from(
        ["H", "C", "6", "X", "Xx", "-1", "0", "1e5", "nan", "inf", "1e999", "0x1", "1_0", "\u0661", ""]
    )
    atom = st.integers(0, 5).map(lambda place: f"C {place} 0 0")
    line = st.one_of(atom, atom, st.lists(word, max_size=6).map(" ".join))
    count = st.sampled_from(["1", "1", "2", "2", "3", "0", "-1", "99999999999999", "1e3", " 2 ", "2 2", ""])
    comment = st.sampled_from(
        ["", "Properties=species:S:1:pos:R:3", "Properties=pos:R:3:species:S:1:x:R:99999999", "Properties=:::"]
    )

    def one(draw, folder):
        path = folder / "crafted.xyz"
        frames = draw(
            st.lists(st.tuples(count, comment, st.lists(line, min_size=1, max_size=3)), min_size=1, max_size=4)
        )
        path.write_text("".join("\n".join((number, about, *atoms)) + "\n" for number, about, atoms in frames))
        check(import_files([path])[0])

    fuzz("crafted XYZ", one)
