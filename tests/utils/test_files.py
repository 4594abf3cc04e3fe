"""Write files safely; read rows of metrics."""

import errno
import os

import pytest

from unite_fast.errors import UserError
from unite_fast.utils.files import atomic_write, check_target, read_rows, save_text, writing


def test_a_folder_for_a_file_and_the_reverse_are_refused(tmp_path, mentions):
    (tmp_path / "a.png").mkdir()
    (tmp_path / "file").touch()
    for out in (tmp_path / "a.png", tmp_path / "file"):
        with pytest.raises(UserError, match=mentions(out, "--out")):
            check_target(out)


@pytest.mark.parametrize("name", ["a.png", "a.npz", "folder", "new/a.png"])
def test_a_new_target_and_an_existing_one_of_its_kind_are_accepted(tmp_path, name):
    check_target(tmp_path / name)
    if name == "folder":
        (tmp_path / name).mkdir()
    elif "/" not in name:
        (tmp_path / name).touch()
    check_target(tmp_path / name)


def test_an_oserror_names_the_file(tmp_path, mentions):
    with pytest.raises(UserError, match=mentions(tmp_path, os.strerror(errno.ENOSPC))), writing(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_only_when_the_new_one_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_text_is_utf8_in_a_new_folder(tmp_path):
    save_text("\u00e9\n", tmp_path / "new" / "a.txt")
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"\xc3\xa9\n"


def test_incomplete_rows_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    path.write_text('{"step": 1, "l1": 2.0}\n[1]\n{"l1": 3}\n{"step": 2, "l1": NaN}\n{"step": 3, "l')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
