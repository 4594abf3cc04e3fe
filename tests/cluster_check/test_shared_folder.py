"""Whether ranks see one folder; here each rank is a host."""

import io
from pathlib import Path

import pytest

from unite_fast.cluster_check import shared_folder
from unite_fast.cluster_check.coordinator import open_store
from unite_fast.cluster_check.shared_folder import describe, make_folder, remove_made, serve, visit
from unite_fast.distributed.process_group import Ranks


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(shared_folder, "SEEN_WITHIN", 1.0)


def check(*folders: Path) -> dict:
    """Rank r uses folder r."""
    ranks = Ranks.from_environment()
    store = open_store(ranks, 20)
    if not ranks.main:
        result = visit(folders[ranks.rank], store, ranks.rank, 10)
        store.set(f"end/{ranks.rank}", "")
        return result
    try:
        return serve(folders[0], store, list(range(1, ranks.world)), 10)
    finally:
        store.wait([f"end/{rank}" for rank in range(1, ranks.world)])


def test_one_folder(ranks, tmp_path):
    first, *others = ranks(3, check, tmp_path, tmp_path, tmp_path)
    assert (first["seen"], first["missing"]) == ([1, 2], [])
    for other in others:
        assert other["sees"] and other["lock_refused"] and other["error"] == ""
        assert other["renamed_after"] < 1
    assert list(tmp_path.iterdir()) == []


def test_another_folder(ranks, tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    first, second, third = ranks(3, check, folders[0], folders[1], folders[0])
    assert (first["seen"], first["missing"]) == ([2], [])
    assert second["sees"] is False and third["sees"] and third["lock_refused"]
    assert [list(folder.iterdir()) for folder in folders] == [[], [], []]


def test_a_folder_that_is_missing_elsewhere(ranks, tmp_path):
    assert ranks(2, check, tmp_path, tmp_path / "a/b")[1]["sees"] is False
    assert list(tmp_path.iterdir()) == []


def test_locks_that_are_not_shared(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder, "lock_folder", lambda *_: io.StringIO())
    second = ranks(2, check, tmp_path, tmp_path)[1]
    assert second["sees"] and second["lock_refused"] is False


def test_a_replaced_file_that_stays_the_old_one(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder.os, "replace", lambda *_: None)
    assert ranks(2, check, tmp_path, tmp_path)[1]["renamed_after"] is None


def test_a_folder_that_cannot_be_written(ranks, tmp_path, monkeypatch):
    def serve_nowhere(*folders: Path) -> dict | str:
        try:
            return check(*folders)
        except Exception as error:
            return str(error)

    first, second = ranks(2, serve_nowhere, tmp_path / "missing", tmp_path)
    assert str(tmp_path / "missing") in first
    assert second["sees"] is None, "rank 0's mistake is not the other host's"


def test_made_folders_are_removed(tmp_path):
    made = make_folder(tmp_path / "a/b")
    assert made == [tmp_path / "a/b", tmp_path / "a"]
    assert make_folder(tmp_path / "a/b") == []
    (tmp_path / "a/kept").touch()
    remove_made(made)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_file_systems():
    assert describe(Path("/proc/self"))["file_system"] == "proc"
    there = describe(Path("/nowhere/at/all"))
    assert there["mount"] == "/" and there["free"] > 0
