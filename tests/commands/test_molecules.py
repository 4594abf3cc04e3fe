import importlib.util
import os
import re
from pathlib import Path

import numpy as np
import pytest

from unite_fast.data_pipeline.molecules.set_file import read_set

GOOD = "3\n\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n"
BROKEN = "1\n\nQ 0 0 0\n"


@pytest.fixture
def qm9_200() -> Path:
    return Path(__file__).parents[1] / "data" / "qm9_200.npz"


@pytest.fixture
def xyz(tmp_path):
    path = tmp_path / "a.xyz"
    path.write_text(GOOD + BROKEN * 12 + GOOD + GOOD.replace("O", "S"))
    return path


def test_it_has_help(command):
    ended = command("molecules", "--help")
    assert (ended.status, ended.err) == (0, "")
    assert re.search(r"Examples?:\s+unite-fast molecules qm9", ended.out)


def test_files_become_a_set(command, xyz, tmp_path, mentions):
    out = tmp_path / "new" / "a.npz"
    ended = command("molecules", xyz, xyz.rename(tmp_path / "b.xyz"), xyz.parent / "c.xyz", out)
    ended.error("a.xyz")
    xyz.write_text(GOOD + BROKEN * 12 + GOOD + GOOD.replace("O", "S"))
    ended = command("molecules", xyz, tmp_path / "b.xyz", out)
    assert ended.status == 0, ended.err
    molecules = read_set(out)
    assert molecules.numbers.tolist() == [[8, 1, 1], [16, 1, 1]]
    splits = np.bincount(molecules.split, minlength=3)
    for tokens in (
        (2, out),
        ("H 4", "O 1", "S 1"),
        ("3 to 3",),
        (f"train {splits[0]}", f"val {splits[1]}", f"test {splits[2]}"),
        ("duplicates", 4),
        ("skipped", 24),
        (f"{xyz}, molecule 11", "'Q'"),
        ("14 more",),
    ):
        assert re.search(mentions(*tokens), ended.out), tokens
    assert len(re.findall(r"molecule \d+: ", ended.out)) == 10


def test_qm9_is_the_package(command, qm9_200, tmp_path, monkeypatch, mentions):
    from unite_fast.data_pipeline.molecules import qm9

    monkeypatch.setattr(qm9, "import_qm9", lambda: read_set(qm9_200))
    ended = command("molecules", "qm9", tmp_path / "a.npz")
    assert ended.status == 0, ended.err
    assert (tmp_path / "a.npz").read_bytes() == qm9_200.read_bytes()
    assert re.search(mentions(200, tmp_path / "a.npz"), ended.out) and "skipped" not in ended.out
    assert re.search(mentions("train 140", "val 30", "test 30"), ended.out)


def test_a_missing_package_names_the_extra(command, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "unite-fast[molecules]" in command("molecules", "qm9", tmp_path / "a.npz").error("qm9pack")
    assert os.listdir(tmp_path) == []


def test_qm9_stands_alone(command, xyz, tmp_path):
    command("molecules", "qm9", xyz, tmp_path / "a.npz").error("qm9")


def test_its_own_output_is_replaced_and_no_other_file(command, xyz, tmp_path):
    out = tmp_path / "a.npz"
    assert command("molecules", xyz, out).status == 0
    first = out.read_bytes()
    assert command("molecules", xyz, out).status == 0 and out.read_bytes() == first
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros(3))
    (tmp_path / "text.npz").write_text("text")
    for name in ("samples.npz", "text.npz"):
        before = (tmp_path / name).read_bytes()
        command("molecules", xyz, tmp_path / name).error(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before


def test_the_output_is_no_source_and_an_npz(command, xyz, tmp_path):
    out = tmp_path / "a.npz"
    assert command("molecules", xyz, out).status == 0
    command("molecules", xyz, out, out).error(out)
    command("molecules", xyz, tmp_path / "b.xyz").error(tmp_path / "b.xyz")
    (tmp_path / "folder.npz").mkdir()
    command("molecules", xyz, tmp_path / "folder.npz").error(tmp_path / "folder.npz")
