import io
import os
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest

from unite_fast.data_pipeline.molecules.set_file import read_set, write_set
from unite_fast.errors import UserError


def assert_same(first, second):
    for name in ("numbers", "positions", "sizes", "split", "index"):
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == other.dtype and np.array_equal(one, other), name
    assert (first.smiles, first.inchi) == (second.smiles, second.inchi)


@pytest.fixture
def water_and_more(make_set):
    molecules = make_set("HHO", "CC", "H")
    molecules.split[:] = [0, 2, 1]
    molecules.index[:] = [2**40, 6, 7]
    molecules.smiles, molecules.inchi = ["O", "CC", "[H] é"], ["InChI=1S/H2O/h1H2", "", "x"]
    return molecules


def test_a_set_comes_back(tmp_path, water_and_more):
    write_set(tmp_path / "new" / "a.npz", water_and_more)
    assert_same(read_set(tmp_path / "new" / "a.npz"), water_and_more)
    assert read_set(tmp_path / "new" / "a.npz").sizes.dtype == np.int64


def test_a_set_without_names_comes_back(tmp_path, make_set):
    molecules = make_set("HHO", "CC")
    write_set(tmp_path / "a.npz", molecules)
    assert_same(read_set(tmp_path / "a.npz"), molecules)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.namelist() == ["Z.npy", "pos.npy", "n.npy", "index.npy", "split.npy"]


def test_numpy_reads_the_arrays(tmp_path, water_and_more):
    write_set(tmp_path / "a.npz", water_and_more)
    with np.load(tmp_path / "a.npz") as file:
        assert [file[name].dtype.str for name in ("Z", "pos", "n", "index", "split")] == [
            *("|u1", "<f4", "<i2", "<i8", "|u1")
        ]
        assert file["n"].tolist() == [3, 2, 1]


def test_the_same_molecules_give_the_same_bytes(tmp_path, qm9_200, water_and_more):
    write_set(tmp_path / "a.npz", read_set(qm9_200))
    assert (tmp_path / "a.npz").read_bytes() == qm9_200.read_bytes()
    write_set(tmp_path / "a.npz", water_and_more)
    os.utime(tmp_path / "a.npz", (0, 0))
    write_set(tmp_path / "b.npz", read_set(tmp_path / "a.npz"))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path, make_set, full_disk, monkeypatch):
    path = tmp_path / "a.npz"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match=r"a\.npz"):
        write_set(path, make_set("HHO"))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.npz"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, make_set, monkeypatch):
    path = tmp_path / "a.npz"
    path.write_bytes(b"old")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(np.lib.format, "write_array", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_set(path, make_set("HHO"))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.npz"]


@pytest.mark.parametrize(
    ("field", "value", "token"),
    [
        ("sizes", [3, 9], "molecule 1"),
        ("positions", np.full((2, 3, 3), np.nan, np.float32), "molecule 0"),
        ("smiles", ["O"], "2"),
        ("smiles", ["O", "C\nC"], "line"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, make_set, field, value, token):
    molecules = make_set("HHO", "CC")
    setattr(molecules, field, np.array(value) if field == "sizes" else value)
    with pytest.raises(UserError, match=token):
        write_set(tmp_path / "a.npz", molecules)
    assert os.listdir(tmp_path) == []


ARRAYS = {
    "Z": np.array([[1, 1, 8], [6, 6, 0]], np.uint8),
    "pos": np.array([[[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 0, 0], [1, 0, 0], [0, 0, 0]]], np.float32),
    "n": np.array([3, 2], np.int16),
    "index": np.array([0, 1]),
    "split": np.array([0, 1], np.uint8),
}
NAMES = {"smiles.txt": b"O\nCC\n", "inchi.txt": b"a\nb\n"}


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


def write_zip(path, changed: dict, compression=zipfile.ZIP_STORED):
    """A good set file with changed members: arrays, bytes, or None to leave a member out."""
    members = {f"{name}.npy": array for name, array in ARRAYS.items()} | NAMES | changed
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content if isinstance(content, bytes) else npy(content))


def test_the_file_of_the_following_tests_is_good(tmp_path):
    write_zip(tmp_path / "a.npz", {}, zipfile.ZIP_DEFLATED)
    molecules = read_set(tmp_path / "a.npz")
    assert (molecules.sizes.tolist(), molecules.smiles) == ([3, 2], ["O", "CC"])


def changed(name: str, *places_and_values) -> dict:
    array = ARRAYS[name].copy()
    for place, value in places_and_values:
        array[place] = value
    return {f"{name}.npy": array}


@pytest.mark.parametrize(
    ("members", "tokens"),
    [
        ({"Z.npy": None}, r"Z\.npy"),
        ({"split.npy": None}, r"split\.npy"),
        ({"Z.npy": ARRAYS["Z"].astype(np.int64)}, r"Z\.npy.*int64"),
        ({"pos.npy": ARRAYS["pos"].astype(np.float64)}, r"pos\.npy.*float64"),
        ({"n.npy": ARRAYS["n"].astype(np.int64)}, r"n\.npy.*int64"),
        ({"pos.npy": ARRAYS["pos"][:, :2]}, r"pos\.npy.*2, 2, 3"),
        ({"Z.npy": ARRAYS["Z"].reshape(-1)}, r"Z\.npy.*\(6,\)"),
        ({f"{name}.npy": array[:0] for name, array in ARRAYS.items()}, r"Z\.npy.*\(0, 3\)"),
        ({"Z.npy": np.ones((2, 257), np.uint8)}, "257"),
        ({"n.npy": ARRAYS["n"][:1]}, r"n\.npy.*\(1,\)"),
        (changed("n", (1, 0)) | changed("Z", (1, 0)) | changed("pos", (1, 0)), "molecule 1 .*size"),
        (changed("n", (1, -3)) | changed("Z", (1, 0)) | changed("pos", (1, 0)), "molecule 1 .*size"),
        (changed("n", (1, 4)), "molecule 1 .*size"),
        (changed("n", (1, 1)), "molecule 1 .*size"),
        (changed("Z", ((1, 0), 0)), "molecule 1 .*atom"),
        (changed("Z", ((1, 1), 119)), "molecule 1 .*atom"),
        (changed("Z", ((1, 2), 1)), "molecule 1 .*size"),
        (changed("pos", ((1, 1, 2), np.nan)), "molecule 1 .*finite"),
        (changed("pos", ((0, 1, 2), -np.inf)), "molecule 0 .*finite"),
        (changed("pos", ((0, 1, 2), 1e30)), "molecule 0 .*finite"),
        (changed("pos", ((1, 2, 0), 1)), "molecule 1 .*size"),
        (changed("pos", ((1, 2, 0), np.nan)), "molecule 1"),
        (changed("split", (1, 3)), "molecule 1 .*split"),
        ({"smiles.txt": b"O\n"}, r"smiles\.txt.* 2 "),
        ({"inchi.txt": b"a\nb\nc\n"}, r"inchi\.txt.* 2 "),
        ({"inchi.txt": b"a\nb"}, r"inchi\.txt.* 2 "),
        ({"smiles.txt": b"\xff\n\n"}, r"smiles\.txt.*UTF-8"),
        ({"Z.npy": b"no array"}, "Z"),
        ({"pos.npy": npy(ARRAYS["pos"])[:-4]}, "pos"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, members, tokens):
    write_zip(tmp_path / "a.npz", members)
    with pytest.raises(UserError, match=rf"a\.npz.*{tokens}"):
        read_set(tmp_path / "a.npz")


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_nothing_is_unpickled(tmp_path):
    objects = np.empty(2, object)
    objects[:] = [Harmful(), Harmful()]
    file = io.BytesIO()
    np.lib.format.write_array(file, objects, allow_pickle=True)
    for member in (file.getvalue(), pickle.dumps(Harmful())):
        write_zip(tmp_path / "a.npz", {"index.npy": member})
        with pytest.raises(UserError, match=r"a\.npz.*index"):
            read_set(tmp_path / "a.npz")


def test_what_would_fill_the_memory_is_refused(tmp_path):
    # 257 MiB in 1 MB; the header says so as well.
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in ARRAYS.items():
            if name != "Z":
                archive.writestr(f"{name}.npy", npy(array))
        with archive.open("Z.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(
                member, {"descr": "|u1", "fortran_order": False, "shape": (257 * 2**13, 128)}
            )
            for _ in range(257):
                member.write(bytes(2**20))
    with pytest.raises(UserError, match=r"a\.npz.*Z"):
        read_set(tmp_path / "a.npz")
    write_zip(tmp_path / "b.npz", {"smiles.txt": b"\n" * 10_000_000}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match=r"b\.npz.*smiles\.txt.*long"):
        read_set(tmp_path / "b.npz")


def test_a_text_that_is_longer_than_it_says_is_refused(tmp_path):
    write_zip(tmp_path / "a.npz", {"smiles.txt": b"O\nCC\n" + b"\n" * 10_000_000}, zipfile.ZIP_DEFLATED)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    place = content.rindex(b"PK\x01\x02", 0, content.rindex(b"smiles.txt")) + 24  # size in the central directory
    content[place : place + 4] = (5).to_bytes(4, "little")
    (tmp_path / "a.npz").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.npz.*smiles\.txt"):
        read_set(tmp_path / "a.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_a_damaged_text_is_noticed(tmp_path):
    write_zip(tmp_path / "a.npz", {})
    content = (tmp_path / "a.npz").read_bytes().replace(b"O\nCC\n", b"O\nCN\n")
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz.*smiles\.txt"):
        read_set(tmp_path / "a.npz")


def test_a_reason_that_quotes_the_file_is_cut(tmp_path):
    write_zip(tmp_path / "a.npz", {})
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[26:28] = (1000).to_bytes(2, "little")  # length of the first name, in the header of its member
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz.*Z") as caught:
        read_set(tmp_path / "a.npz")
    assert len(str(caught.value)) < 1000


def test_a_member_that_stands_twice_is_refused(tmp_path):
    write_zip(tmp_path / "a.npz", {})
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive, pytest.warns(UserWarning):
        archive.writestr("smiles.txt", b"O\nCC\n")
    with pytest.raises(UserError, match=r"a\.npz.*smiles\.txt"):
        read_set(tmp_path / "a.npz")


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"a\.npz.*unite-fast molecules qm9"):
        read_set(tmp_path / "a.npz")


def test_what_is_no_zip_file_is_one_line(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "empty.npz").touch()
    write_zip(tmp_path / "a.npz", {})
    (tmp_path / "short.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-30])
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("folder", "text", "empty", "short", "pipe"):
        with pytest.raises(UserError, match=rf"{name}\.npz"):
            read_set(tmp_path / f"{name}.npz")
