import hashlib

import numpy as np
import pytest

from unite_fast.data_pipeline.molecules.import_files import digest_of, import_files, split_of
from unite_fast.data_pipeline.molecules.sdf import write_sdf
from unite_fast.data_pipeline.molecules.set_file import read_set, write_set
from unite_fast.data_pipeline.molecules.xyz import write_xyz
from unite_fast.errors import UserError


def text_of(number: int, shift: float = 0.0) -> str:
    """A molecule of two atoms that no other number has."""
    return f"2\n\nC {shift} 0 0\nO {shift} 0 {1 + 0.01 * number}\n"


@pytest.fixture
def write(tmp_path):
    def run(name: str, *texts: str):
        (tmp_path / name).write_text("".join(texts))
        return tmp_path / name

    return run


def test_every_format_is_read(tmp_path, qm9_200):
    molecules = read_set(qm9_200)
    few = molecules.take(np.arange(5))
    write_set(tmp_path / "a.npz", few)
    write_xyz(tmp_path / "b.extxyz", molecules.take([6, 7]))
    paths = [tmp_path / "a.npz", tmp_path / "b.extxyz"]
    read, left_out = import_files(paths)
    assert (len(read), left_out.broken, left_out.duplicates) == (7, 0, 0)
    assert read.sizes.tolist() == molecules.sizes[[0, 1, 2, 3, 4, 6, 7]].tolist()
    assert read.numbers.shape[1] == read.sizes.max()
    # A set that is centred keeps its bits.
    assert all(np.array_equal(read.positions[row, :n], few.positions[row, :n]) for row, n in enumerate(few.sizes))
    assert (read.smiles, read.inchi) == ([], [])
    assert import_files([tmp_path / "a.npz"])[0].smiles == few.smiles


def test_sdf_and_xyz_of_one_molecule_are_duplicates(tmp_path, make_set):
    pytest.importorskip("rdkit")
    molecules = make_set("HCN", "HHO")
    write_xyz(tmp_path / "a.xyz", molecules)
    write_sdf(tmp_path / "b.SDF", molecules)
    read, left_out = import_files([tmp_path / "b.SDF", tmp_path / "a.xyz"])
    assert (len(read), left_out.duplicates, read.smiles) == (2, 2, [])


def test_positions_are_centred(write):
    read, _ = import_files([write("a.xyz", "3\n\nC 7 8 9\nO 7 8 10\nH 10 8 9\n")])
    assert np.abs(read.positions[0].sum(0)).max() < 1e-6
    assert np.allclose(read.positions[0] - read.positions[0, 0], [[0, 0, 0], [0, 0, 1], [3, 0, 0]], atol=1e-6)


def test_identical_molecules_are_kept_once(write):
    moved, other = text_of(0, 5.0), text_of(0).replace("C", "N")
    nearly = "2\n\nC 0 0.0001 0\nO 0 0.0001 1.0001\n"
    read, left_out = import_files([write("a.xyz", text_of(0), moved, other), write("b.xyz", nearly, text_of(1))])
    assert (len(read), left_out.duplicates) == (3, 2)
    assert read.numbers.tolist() == [[6, 8], [7, 8], [6, 8]]
    assert read.index.tolist() == [0, 2, 4]


def test_the_split_is_that_of_the_digest():
    numbers, positions = np.array([6, 8], np.uint8), np.array([[0, 0, -0.5], [0, -1e-9, 0.5004]], np.float32)
    content = bytes([6, 8]) + np.array([0, 0, -500, 0, 0, 500], "<i8").tobytes()
    assert digest_of(numbers, positions) == hashlib.sha256(content).digest()
    splits = [split_of(number.to_bytes(32, "big")) for number in range(10, 20)]
    assert splits == [2, 1, 0, 0, 0, 0, 0, 0, 0, 0]


def test_more_files_move_no_molecule_to_another_split(write):
    first = write("a.xyz", *map(text_of, range(100)))
    alone, _ = import_files([first])
    together, _ = import_files([write("b.xyz", *map(text_of, range(300, 50, -1))), first])
    split_at = {round(float(z), 3): split for z, split in zip(alone.positions[:, 1, 2], alone.split, strict=True)}
    again = {round(float(z), 3): split for z, split in zip(together.positions[:, 1, 2], together.split, strict=True)}
    assert len(split_at) == 100 and len(again) == 301
    assert split_at == {place: again[place] for place in split_at}
    # 30 +- 5 of 301 are expected in each held-out split.
    assert all(10 < count < 60 for count in np.bincount(together.split)[1:])


def test_a_set_that_is_imported_again_is_the_same(tmp_path, write):
    read, _ = import_files([write("a.xyz", *map(text_of, range(50)))])
    write_set(tmp_path / "a.npz", read)
    again, _ = import_files([tmp_path / "a.npz"])
    write_set(tmp_path / "b.npz", again)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_broken_molecules_are_counted(write):
    broken = text_of(1).replace("O", "Q")
    paths = [write("a.xyz", text_of(0), broken, text_of(2)), write("b.xyz", broken, text_of(3), broken)]
    read, left_out = import_files(paths)
    assert (len(read), left_out.broken) == (3, 3)
    assert [example.rsplit("/", 1)[1].split(":")[0] for example in left_out.examples] == [
        *("a.xyz, molecule 2", "b.xyz, molecule 1", "b.xyz, molecule 3")
    ]
    assert read.index.tolist() == [0, 2, 4]
    assert import_files([*paths, write("c.xyz", text_of(9))])[0].index.tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("name", "text"), [("a.xyz", ""), ("a.xyz", "text"), ("a.mol2", "x"), ("a.npz", "x"), ("a", "x")]
)
def test_a_file_without_molecules_is_an_error(write, name, text):
    good = write("good.xyz", text_of(0))
    with pytest.raises(UserError, match=rf"/{name} "):
        import_files([good, write(name, text)])


def test_no_files_and_missing_files_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"\.xyz"):
        import_files([])
    with pytest.raises(UserError, match=r"missing\.xyz"):
        import_files([tmp_path / "missing.xyz"])
