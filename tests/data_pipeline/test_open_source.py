"""Open data by kind, detect the kind, register a new kind."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from unite_fast.data_pipeline import detect_source, open_held_out, open_source, register_source
from unite_fast.data_pipeline.shards.raw_images import find_raw_images
from unite_fast.data_pipeline.source import MemorySource
from unite_fast.data_pipeline.splits import HELD_OUT, ClassesDiffer
from unite_fast.errors import UserError


def test_an_unknown_kind_or_split_is_refused(mentions):
    with pytest.raises(UserError, match=mentions("data.source", "'webdata'", "digits", "folder", "idx", "shards")):
        open_source("webdata", None, 8, "train")
    with pytest.raises(UserError, match=mentions("split", "'valid'", "train", "test")):
        open_source("digits", None, 8, "valid")


@pytest.mark.parametrize("kind", ["folder", "idx"])
@pytest.mark.parametrize("path", [None, ""])
def test_a_path_is_needed(kind, path, mentions):
    with pytest.raises(UserError, match=mentions(kind, "data.path")):
        open_source(kind, path, 8, "train")


@pytest.mark.parametrize("kind", ["digits", "synthetic"])
def test_a_path_is_refused_where_no_files_are_read(kind, mentions):
    with pytest.raises(UserError, match=mentions(kind, "data.path", "somewhere")):
        open_source(kind, "somewhere", 8, "train")


def test_the_kind_is_detected_from_the_files(shards, image_folder, tmp_path):
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / "train-images-idx3-ubyte.gz").touch()
    raw = shards("raw")
    for data, kind in (
        (str(raw), "shards"),
        (str(image_folder), "folder"),
        (str(tmp_path / "idx"), "idx"),
        (str(tmp_path / "nowhere"), "folder"),
        ("https://host/set", "shards"),
        ("pipe:cat set/{}", "shards"),
    ):
        assert detect_source(data) == (kind, data)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").symlink_to(raw)
    assert detect_source(str(tmp_path / "set"))[0] == "shards"
    assert detect_source("digits") == ("digits", "")
    assert detect_source("./digits") == ("folder", "./digits")


def test_size_0_is_the_default_of_the_kind(shards, image_folder):
    assert open_source("digits", "", 0, "train").image_size == 8
    assert open_source("folder", str(image_folder), 0, "train").image_size == 256
    assert open_source("shards", str(shards("raw")), 0, "train").image_size == 32
    assert open_source("synthetic", "", 0, "train").image_size == 256


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


def test_folders_and_shards_have_the_same_names_for_splits(shards, tmp_path, mentions):
    for word in ("training", "validation", "test"):
        save(tmp_path / "folder" / word / "a" / "0.png")
        (tmp_path / "shards").mkdir(exist_ok=True)
        (tmp_path / "shards" / word).symlink_to(shards("raw"))
    (tmp_path / "shards" / "validation").unlink()
    shutil.copytree(shards("raw"), tmp_path / "shards" / "validation")
    for kind in ("folder", "shards"):
        path = str(tmp_path / kind)
        assert detect_source(path)[0] == kind
        for split, name in (("train", "training"), ("val", "validation"), (HELD_OUT, "validation")):
            source = open_source(kind, path, 0, split)
            assert (source.split, source.held_out) == (name, split != "train")
    with pytest.raises(UserError, match=mentions("test", "link")):
        open_source("shards", str(tmp_path / "shards"), 0, "test")


def test_data_without_splits_are_not_held_out(shards, image_folder, tmp_path, forget_registered_sources):
    for kind, path in (("folder", image_folder), ("shards", shards("raw"))):
        assert not open_held_out(kind, str(path), 32)[1]
    assert open_held_out("digits", "", 8)[1] and open_held_out("synthetic", "", 8)[1]

    def open_dots(path, image_size, split):
        value = 1 if split == "test" and path == "apart" else 0
        images = torch.full((3, 4, 4), value, dtype=torch.uint8)
        return MemorySource("dot", images, torch.zeros(3).long(), ["a"])

    register_source("dots", open_dots)
    assert open_held_out("dots", "apart", 4)[1] and not open_held_out("dots", "same", 4)[1]


def test_held_out_shards_of_other_classes_are_refused(make, image_folder, tmp_path, mentions):
    make(image_folder, out=tmp_path / "set" / "train")
    shutil.copytree(image_folder, tmp_path / "other")
    (tmp_path / "other" / "class2").rename(tmp_path / "other" / "2")
    for name in ("class0", "class2"):
        out = tmp_path / name
        shutil.copytree(image_folder, tmp_path / f"without {name}", ignore=shutil.ignore_patterns(name))
        make(tmp_path / f"without {name}", out=out)
        (tmp_path / "set" / "val").unlink(missing_ok=True)
        (tmp_path / "set" / "val").symlink_to(out)
        with pytest.raises(ClassesDiffer, match=mentions(tmp_path / "set" / "val", tmp_path / "set" / "train")):
            open_held_out("shards", str(tmp_path / "set"), 32)


def test_a_registered_kind_opens_like_any_other(forget_registered_sources, mentions):
    calls = []

    def open_dots(path, image_size, split):
        calls.append((path, image_size, split))
        return MemorySource(
            "dot", torch.zeros(3, image_size, image_size, dtype=torch.uint8), torch.zeros(3).long(), ["a"]
        )

    register_source("dots", open_dots, needs_path=False, image_size=4)
    register_source("files", open_dots)
    assert detect_source("dots") == ("dots", "") and detect_source("files")[0] == "folder"
    assert open_source("dots", None, 0, "test").image_size == 4
    assert open_source("files", "here", 6, "train").image_size == 6
    assert calls == [("", 4, "test"), ("here", 6, "train")]
    with pytest.raises(UserError, match=mentions("dots", "data.path", "here")):
        open_source("dots", "here", 4, "train")
    with pytest.raises(UserError, match=mentions("files", "data.path")):
        open_source("files", "", 4, "train")
    with pytest.raises(UserError, match=mentions("data.source", "'dot'", "dots", "digits", "register_source")):
        open_source("dot", "", 4, "train")
    for taken in ("dots", "digits", "synthetic"):
        with pytest.raises(ValueError, match=taken):
            register_source(taken, open_dots)


def test_a_tilde_means_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "a" / "0.png")
    assert len(open_source("folder", "~/data", 8, "train")) == 1


@pytest.mark.parametrize("kind", ["folder", "idx", "shards"])
@pytest.mark.parametrize("path", ["a" * 300, "a/" * 3000, "a\0b"])
def test_a_path_that_no_system_has_is_one_line(kind, path):
    with pytest.raises(UserError, match="no "):
        open_source(kind, path, 8, "train")
    assert detect_source(path) == ("folder", path)
    with pytest.raises(UserError, match="no file or folder"):
        find_raw_images(Path(path), "train", None, Path("staging"))
