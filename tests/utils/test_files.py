"""Write files safely: nothing of others is written to or lost."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from unite_fast.errors import UserError
from unite_fast.utils import files
from unite_fast.utils.files import (
    BEGINNINGS,
    atomic_write,
    check_not_read,
    check_npz,
    check_replaceable,
    check_target,
    clear_partial,
    home_path,
    make_folder,
    open_regular,
    private_folder,
    read_small,
    remove_partial,
    save_text,
    writing,
)


def test_the_home_of_nobody_is_named(mentions, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert home_path("~/a") == Path("/home/me/a")
    with pytest.raises(UserError, match=mentions("~no-such-user/a")):
        home_path("~no-such-user/a")


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


def test_a_pipe_a_device_and_a_folder_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path, "/dev/zero"):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)


def test_a_regular_file_and_a_link_to_one_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("a")
    for name in ("a", "link"):
        assert read_small(tmp_path / name, 3) == b"abc"
    with pytest.raises(OSError, match="larger than 2 bytes"):
        read_small(tmp_path / "a", 2)


def test_a_write_follows_no_link_and_takes_no_name_in_use(tmp_path):
    """A folder that came from elsewhere may hold links under any name that could be guessed."""
    (tmp_path / "victim").write_text("mine")
    for name in ("a.txt", "a.txt.partial", ".a.txt.partial"):
        (tmp_path / name).symlink_to("victim")
    save_text("new", tmp_path / "a.txt")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "a.txt").read_text() == "new" and not (tmp_path / "a.txt").is_symlink()


def test_a_write_takes_no_name_in_use_even_if_it_is_guessed(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0" * 2 * count)
    with atomic_write(tmp_path / "a.txt") as partial:
        name = partial.name
    (tmp_path / "victim").write_text("mine")
    (tmp_path / name).symlink_to("victim")
    with pytest.raises(UserError):
        save_text("new", tmp_path / "a.txt")
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_only_a_regular_file_is_replaced(tmp_path, kind, mentions):
    path = tmp_path / "a"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path = Path("/dev/full")
    before = path.lstat()
    with pytest.raises(UserError, match=mentions(path)):
        save_text("new", path)
    assert os.path.samestat(path.lstat(), before)


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, full_disk, mentions):
    (tmp_path / "a").write_text("old")
    with pytest.raises(UserError, match=mentions(tmp_path / "a", os.strerror(errno.ENOSPC))):
        save_text("new", tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_what_killed_processes_left_of_a_file_is_removed(tmp_path):
    with atomic_write(tmp_path / "a") as partial, private_folder(partial) as folder:
        (folder / "b").touch()
        left = [partial.name, folder.name]
        mine = tmp_path / "mine.partial"
        mine.touch()
        other = tmp_path / partial.name.replace(partial.name.split("-")[1], "0" * 8)
        other.touch()
        names = os.listdir(tmp_path)
        assert set(left) < set(names)
        remove_partial(tmp_path / "a")
        assert set(os.listdir(tmp_path)) == {mine.name, other.name}
        partial.touch()
        folder.mkdir()


@pytest.mark.parametrize(
    ("name", "content"), [("a.png", b"\xff\xd8\xff"), ("a.npz", b"text"), ("a.html", b"{}"), ("a.json", b"[]")]
)
def test_a_foreign_file_is_in_the_way(tmp_path, name, content, mentions):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=mentions(tmp_path / name, "in the way")):
        check_target(tmp_path / name, (name[1:],))
    # Through a link as well: it would be replaced.
    (tmp_path / f"link{name[1:]}").symlink_to(name)
    with pytest.raises(UserError, match="in the way"):
        check_replaceable(tmp_path / f"link{name[1:]}", BEGINNINGS[name[1:]])


def test_an_npz_is_replaced_only_by_one_of_its_kind(tmp_path, mentions):
    np.savez(tmp_path / "a.npz", mu=0)
    check_npz(tmp_path / "a.npz", "mu.npy")
    with pytest.raises(UserError, match=mentions(tmp_path / "a.npz", "arr_0")):
        check_npz(tmp_path / "a.npz", "arr_0.npy")
    check_npz(tmp_path / "none.npz", "arr_0.npy")


def test_what_is_read_is_not_written_by_any_name(tmp_path, mentions, monkeypatch):
    source, data = tmp_path / "a.pt", tmp_path / "data"
    source.touch()
    (data / "cats").mkdir(parents=True)
    (data / "cats" / "0.png").touch()
    (tmp_path / "soft").symlink_to("a.pt")
    os.link(source, tmp_path / "hard")
    os.link(data / "cats" / "0.png", tmp_path / "image")
    (tmp_path / "elsewhere").symlink_to(data)
    for out in (source, tmp_path / "soft", tmp_path / "hard", tmp_path / "data" / ".." / "a.pt"):
        with pytest.raises(UserError, match=mentions(source)):
            check_not_read(out, "digits", source)
    for out in (data, data / "x.png", data / "cats" / "new.npz", tmp_path / "elsewhere" / "x", tmp_path / "image"):
        with pytest.raises(UserError, match=mentions(data)):
            check_not_read(out, data)
    check_not_read(tmp_path / "data2", source, data)
    monkeypatch.chdir(data)
    with pytest.raises(UserError):
        check_not_read(Path("x.png"), ".")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop"):
        check_not_read(tmp_path / "loop", source)


def test_a_folder_of_a_run_is_no_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    make_folder(tmp_path / "new" / "x")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("link", "dangling"):
        with pytest.raises(OSError, match="link"):
            make_folder(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no folder"):
        make_folder(tmp_path / "pipe")


def test_partial_files_behind_a_link_stay(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / ".unite_fast-x.partial").touch()
    (tmp_path / "link").symlink_to("real")
    clear_partial(tmp_path / "link")
    assert os.listdir(tmp_path / "real")
    clear_partial(tmp_path / "real")
    assert not os.listdir(tmp_path / "real")


@pytest.mark.parametrize("source", ["a" * 300, "a\0b", ""])
def test_a_source_that_no_system_has_is_not_in_the_way(tmp_path, source):
    check_not_read(tmp_path / "out", tmp_path / source / "b")
