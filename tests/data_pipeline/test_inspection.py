"""`unite-fast inspect`."""

import re

import pytest
from PIL import Image


def test_it_counts_images_saves_a_grid_and_times_loaders(command, shards, image_folder, tmp_path, mentions):
    out = tmp_path / "grid.png"
    for data, kind, loaders in (
        (shards("raw"), "shards", ["raw"]),
        (shards("original"), "shards", ["webdataset", "dali"]),
        (image_folder, "folder", ["folder"]),
    ):
        ended = command("inspect", data, "--image-size", 32, "--seconds", 0.2, "--out", out)
        assert (ended.status, ended.err) == (0, "")
        assert re.search(mentions(kind, 41, "32 x 32", 3), ended.out)
        assert re.search(mentions("class0 (14)", "class1 (14)", "class2 (13)"), ended.out)
        assert [match for match in re.findall(r"^loader (\w+): ", ended.out, re.M)] == loaders
        assert re.search(rf"{loaders[0]}: \d+ images/s .*\b2\b", ended.out)
        assert re.search(mentions("data.loader=auto", loaders[0]), ended.out)
        with Image.open(out) as picture:
            assert picture.width == (8 * 33 + 1) * 2


def test_size_0_is_the_default_of_the_data(command, shards, tmp_path, mentions):
    ended = command("inspect", "digits", "--seconds", 0.1, "--out", tmp_path / "a.png")
    assert re.search(mentions("digits", 1437, "8 x 8", 10), ended.out)
    ended = command("inspect", shards("raw"), "--seconds", 0.1, "--out", tmp_path / "a.png")
    assert re.search(mentions(41, "32 x 32"), ended.out)


@pytest.mark.parametrize("options", [("nowhere",), ("digits", "--out", "x.jpg"), ("digits", "--split", "x")])
def test_a_mistake_is_one_error_line(command, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    command("inspect", *options).error()
