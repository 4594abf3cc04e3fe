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


def test_it_names_the_split_what_is_left_out_and_escapes_names(command, tmp_path, mentions):
    for name in ("training/a\x1b[31m/0.png", "valid/a\x1b[31m/1.png", "valid/a\x1b[31m/2.txt"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, "png")
    options = ("--image-size", 8, "--seconds", 0.01, "--workers", 0, "--out", tmp_path / "a.png")
    ended = command("inspect", tmp_path / "set", "--split", "validation", *options)
    assert (ended.status, ended.err) == (0, "")
    assert re.search(mentions("1 images", "split valid"), ended.out) and "\x1b" not in ended.out
    assert re.search(r"^left out: 1 .*2\.txt", ended.out, re.M)
    assert "a\\x1b[31m (1)" in ended.out
    ended = command("inspect", tmp_path / "set" / "valid", "--split", "test", *options)
    assert re.search(mentions("no splits", "training images"), ended.out)


@pytest.mark.parametrize("options", [("nowhere",), ("digits", "--out", "x.jpg"), ("digits", "--split", "x")])
def test_a_mistake_is_one_error_line(command, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    command("inspect", *options).error()


def test_a_seed_out_of_range_is_one_line(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command("inspect", "digits", "--seed", "-1").error("--seed", -1)
