import os

import numpy as np
import pytest

from unite_fast.data_pipeline.molecules.frames import LeftOut
from unite_fast.data_pipeline.molecules.set_file import read_set
from unite_fast.data_pipeline.molecules.xyz import read_xyz, write_xyz
from unite_fast.errors import UserError

WATER = "3\nwater\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n"
CARBON_MONOXIDE = "2\n\n6 0 0 0\n8 0 0 1.13e0\n"


@pytest.fixture
def read(tmp_path):
    """Reads a text: numbers in the file, molecules, and what was left out."""

    def run(text: str):
        path, left_out = tmp_path / "a.xyz", LeftOut()
        path.write_text(text)
        pairs = list(read_xyz(path, left_out))
        return [number for number, _ in pairs], [frame for _, frame in pairs], left_out

    return run


def test_several_molecules(read):
    numbers, frames, left_out = read(WATER + CARBON_MONOXIDE + WATER.replace("O ", "o "))
    assert numbers == [1, 2, 3] and left_out == LeftOut()
    assert [frame.numbers.tolist() for frame in frames] == [[8, 1, 1], [6, 8], [8, 1, 1]]
    assert frames[1].positions.dtype == np.float64 and frames[1].positions.tolist() == [[0, 0, 0], [0, 0, 1.13]]


def test_blank_lines_and_line_ends_of_windows(read):
    numbers, frames, left_out = read("\n \n" + WATER.replace("\n", "\r\n") + "\n\n  " + CARBON_MONOXIDE.strip())
    assert numbers == [1, 2] and left_out.broken == 0
    assert frames[0].numbers.tolist() == [8, 1, 1]


@pytest.mark.parametrize(
    "comment",
    [
        'Lattice="9 0 0 0 9 0 0 0 9" Properties=charge:R:1:pos:R:3:forces:R:3:species:S:1 energy=-1',
        'properties="charge:R:1:POS:r:3:forces:R:3:species:S:1" pbc="F F F"',
        "Properties=charge:R:1:positions:R:3:forces:R:3:Z:I:1",
    ],
)
def test_properties_name_the_columns(read, comment):
    _, frames, _ = read(f"2\n{comment}\n-1 1 2 3 7 7 7 6\n1 4 5 6 8 8 8 8\n")
    assert frames[0].numbers.tolist() == [6, 8]
    assert frames[0].positions.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_the_files_of_qm9_have_other_numbers_and_text_after_the_atoms(read):
    text = "2\ngdb 1\nC 0.5 1.*^-6 0 -0.5\nO 0 0 1.13 0.5\n1341.3 1341.3 1562.6 3151.7\nC#O C#O\nInChI=1S/CO InChI\n"
    numbers, frames, left_out = read(text * 2)
    assert (numbers, left_out.broken) == ([1, 2], 0)
    assert frames[0].positions[0].tolist() == [0.5, 1e-6, 0]


@pytest.mark.parametrize(
    ("broken", "tokens"),
    [
        ("x\nc\nO 0 0 0\nH 1 0 0\n", "'x'"),
        ("-2\nc\nO 0 0 0\nH 1 0 0\n", "'-2'"),
        ("2.0\nc\nO 0 0 0\nH 1 0 0\n", "'2.0'"),
        ("0\nc\n", "no atoms"),
        ("257\nc\nO 0 0 0\n", "257"),
        (f"{'9' * 6000}\nc\nO 0 0 0\n", "256"),
        ("3\nc\nO 0 0 0\nH 1 0 0\n", "2 .* 3"),
        ("1\nc\nO 0 0 0\nH 1 0 0\n", "1"),
        ("2\nc\nO 0 0 0\nQ 1 0 0\n", "'Q'"),
        ("2\nc\nO 0 0 0\n119 1 0 0\n", "'119'"),
        ("2\nc\nO 0 0 0\nH 1 nan 0\n", "finite"),
        ("2\nc\nO 0 0 0\nH inf 0 0\n", "finite"),
        ("2\nc\nO 0 0 0\nH 1e999 0 0\n", "finite"),
        ("2\nc\nO 0 0 0\nH 1 zero 0\n", "zero"),
        ("2\nc\nO 0 0 0\nH 1 0\n", "1 .* 2"),
        ("2\nc\nO 0 0 0\nH 0.05 0 0\n", "duplicate atoms"),
        ("1\nProperties=pos:R:3:name:S:1\n0 0 0 O\n", "species"),
        ("1\nProperties=species:S:1:pos:R:2\nO 0 0 0\n", "pos"),
        ("1\nProperties=charges:R:9:species:S:1:pos:R:3\nO 0 0 0\n", "columns"),
    ],
)
def test_a_broken_molecule_is_named_and_the_next_is_read(read, broken, tokens):
    numbers, frames, left_out = read(WATER + broken + CARBON_MONOXIDE)
    assert (numbers, [len(frame.numbers) for frame in frames]) == ([1, 3], [3, 2])
    assert left_out.broken == 1
    assert np.all([word in left_out.examples[0] for word in ("a.xyz, molecule 2: ", *tokens.split(" .* "))])


def test_an_unfinished_file_keeps_what_is_whole(read):
    numbers, _, left_out = read(WATER + WATER[:-20])
    assert (numbers, left_out.broken) == ([1], 1)


@pytest.mark.parametrize("text", ["", "\n \n", "text\n" * 30, "2\nc\nO 0 0 0\nH nan 0 0\n", "0\n\n"])
def test_a_file_without_a_good_molecule_is_an_error(read, text):
    with pytest.raises(UserError, match=r"a\.xyz"):
        read(text)


def test_bytes_that_are_no_text(read, tmp_path):
    (tmp_path / "b.xyz").write_bytes(WATER.encode() + os.urandom(10_000) + b"\n" + WATER.encode())
    assert len(list(read_xyz(tmp_path / "b.xyz", LeftOut()))) >= 1


def test_what_is_written_is_read_again(tmp_path, qm9_200):
    molecules = read_set(qm9_200)
    write_xyz(tmp_path / "a.xyz", molecules, molecules.smiles)
    frames = [frame for _, frame in read_xyz(tmp_path / "a.xyz", LeftOut())]
    assert len(frames) == 200
    for row, frame in enumerate(frames):
        size = molecules.sizes[row]
        assert np.array_equal(frame.numbers, molecules.numbers[row, :size])
        # Six digits after the point.
        assert np.abs(frame.positions - molecules.positions[row, :size]).max() <= 0.5e-6 + 1e-15
    lines = (tmp_path / "a.xyz").read_text().splitlines()
    assert lines[1] == f"Properties=species:S:1:pos:R:3 {molecules.smiles[0]}"


def test_comments_of_several_lines_or_another_number_are_refused(tmp_path, make_set):
    for comments in (["a\nb"], [], ["a", "b"]):
        with pytest.raises(UserError):
            write_xyz(tmp_path / "a.xyz", make_set("HHO"), comments)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, make_set, full_disk):
    (tmp_path / "a.xyz").write_text("old")
    with pytest.raises(UserError, match=r"a\.xyz"):
        write_xyz(tmp_path / "a.xyz", make_set("HHO"))
    assert (tmp_path / "a.xyz").read_text() == "old" and os.listdir(tmp_path) == ["a.xyz"]
