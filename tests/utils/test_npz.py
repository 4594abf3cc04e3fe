"""Files of arrays: what numpy writes, and what would unpickle, fill the memory or hang."""

import io
import os
import struct
import zipfile

import numpy as np
import pytest

from unite_fast.utils import npz
from unite_fast.utils.npz import read_npz

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b/c": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "scalar": np.float64(3),
    "empty": np.zeros((0, 5), np.int16),
    "mask": np.array([True, False]),
    "big": np.arange(3, dtype=">i4"),
    "bytes": np.frombuffer(b"text", np.uint8),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_numpy_reads_them(tmp_path, save):
    save(tmp_path / "a.npz", **ARRAYS)
    read = read_npz(tmp_path / "a.npz")
    assert read.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert np.array_equal(read[name], array) and read[name].shape == np.shape(array), name
        assert read[name].dtype == np.asarray(array).dtype.newbyteorder("=") and read[name].flags.writeable, name


def test_arrays_that_are_not_wanted_are_not_looked_at(tmp_path):
    np.savez(tmp_path / "a.npz", a=ARRAYS["a"], other=np.array([{}], dtype=object))
    assert read_npz(tmp_path / "a.npz", lambda name: name == "a").keys() == {"a"}
    with pytest.raises(ValueError, match="object"):
        read_npz(tmp_path / "a.npz")


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


CLAIM = "{'descr': '%s', 'fortran_order': False, 'shape': %s}"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no array",
        npy("{}"),
        npy("(" * 5000),
        npy("__import__('os').system('touch mark')"),
        npy(CLAIM % ("<f4", "(2**40,)")),
        npy(CLAIM % ("<f4", f"({2**40},)"), bytes(64)),
        npy(CLAIM % ("<f4", f"({2**62}, {2**62})"), bytes(64)),
        npy(CLAIM % ("<f4", "(-1,)"), bytes(64)),
        npy(CLAIM % ("<f4", "(True,)"), bytes(4)),
        npy(CLAIM % ("<f4", "(3,)"), bytes(64)),
        npy(CLAIM % ("<f4", "(3,)"), bytes(11)),
        npy(CLAIM % ("|O", "(1,)"), b"cos\nsystem\n(S'touch mark'\ntR."),
        npy(CLAIM % ("<c8", "(1,)"), bytes(8)),
        npy(CLAIM % ("<U2", "(1,)"), bytes(8)),
        npy(CLAIM % ("<M8[s]", "(1,)"), bytes(8)),
        npy(CLAIM % ("<f16", "(1,)"), bytes(16)),
        npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}", bytes(4)),
    ],
)
def test_other_content_is_one_value_error(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("a.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(ValueError) as caught:
        read_npz(tmp_path / "a.npz")
    assert "\n" not in str(caught.value) and not os.path.exists("mark")


def test_a_name_that_stands_twice_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive, pytest.warns(UserWarning):
        archive.writestr("a.npy", npy(CLAIM % ("<f4", "(1,)"), bytes(4)))
    with pytest.raises(ValueError, match="twice"):
        read_npz(tmp_path / "a.npz")


def test_a_damaged_byte_and_a_bomb_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(1000))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="CRC"):
        read_npz(path)
    monkeypatch.setattr(npz, "FREE_BYTES", 1000)
    np.savez_compressed(path, a=np.zeros(100_000))
    with pytest.raises(ValueError, match="compressed"):
        read_npz(path)
    monkeypatch.setattr(npz, "MOST_BYTES", 1000)
    np.savez(path, a=np.zeros(1000))
    with pytest.raises(ValueError, match="large"):
        read_npz(path)


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "nothing", tmp_path):
        with pytest.raises(OSError):
            read_npz(path)
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    (tmp_path / "a.npy").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError):
        read_npz(tmp_path / "a.npy")
