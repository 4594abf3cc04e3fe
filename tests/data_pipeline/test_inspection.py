"""`unite-fast inspect`."""

import re

import pytest
from PIL import Image


def test_it_counts_shows_and_times(command, shards, image_folder, tmp_path):
    out = tmp_path / "grid.png"
    for data, kind, loaders in (
        (shards("raw"), "shards", ["raw"]),
        (shards("original"), "shards", ["webdataset", "dali"]),
        (image_folder, "folder", ["folder"]),
    ):
        ended = command("inspect", data, "--image-size", 32, "--seconds", 0.2, "--out", out)
        assert (ended.status, ended.err) == (0, "")
        assert f"{kind}: 41 images of 32 x 32 pixels, 3 classes" in ended.out
        assert "classes: class0 (14), class1 (14), class2 (13); 13 to 14 images each" in ended.out
        assert [match for match in re.findall(r"^loader (\w+): ", ended.out, re.M)] == loaders
        assert re.search(rf"loader {loaders[0]}: \d+ images/s with 2 workers", ended.out)
        assert "data.loader=auto takes" in ended.out
        with Image.open(out) as picture:
            assert picture.width == (8 * 33 + 1) * 2


def test_digits_and_sizes(command, shards, tmp_path):
    ended = command("inspect", "digits", "--seconds", 0.1, "--out", tmp_path / "a.png")
    assert "digits: 1437 images of 8 x 8 pixels, 10 classes" in ended.out
    ended = command("inspect", shards("raw"), "--seconds", 0.1, "--out", tmp_path / "a.png")
    assert "41 images of 32 x 32 pixels" in ended.out


@pytest.mark.parametrize("options", [("nowhere",), ("digits", "--out", "x.jpg"), ("digits", "--split", "x")])
def test_mistakes(command, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    command("inspect", *options).error()
