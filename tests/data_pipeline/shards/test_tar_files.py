"""Tar files: class folders, class tars, splits, WebDataset samples, copies, and what is refused or left out."""

import gzip
import io
import json
import os
import shutil
import tarfile

import pytest

from unite_fast.data_pipeline.shards.raw_images import find_raw_images
from unite_fast.data_pipeline.splits import ClassesDiffer, NoSplit
from unite_fast.errors import UserError


def tar(files) -> bytes:
    """A tar file; the values are contents, or a type of member."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as out:
        for name, contents in files:
            info = tarfile.TarInfo(name)
            if isinstance(contents, bytes) and contents in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
                info.type, info.linkname = contents, "elsewhere.jpg"
                out.addfile(info)
            else:
                contents = contents if isinstance(contents, bytes) else str(contents).encode()
                info.size = len(contents)
                out.addfile(info, io.BytesIO(contents))
    return data.getvalue()


@pytest.fixture
def listed(tmp_path):
    """Writes tar files and lists them: path -> class of each image, and the listing."""

    def run(tars, split="train", single=None, labels=None):
        folder = tmp_path / "tars"
        shutil.rmtree(folder, ignore_errors=True)
        for name, files in tars.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(files if isinstance(files, bytes) else tar(files))
        if labels is not None:
            (tmp_path / "labels.txt").write_text(labels)
        file = tmp_path / "labels.txt" if labels is not None else None
        images = find_raw_images(folder / single if single else folder, split, file, tmp_path / "staging")
        classes = [images.class_names[label] for label in images.labels.tolist()]
        assert sorted(images.read(number) for number in range(len(images)))
        return dict(zip(images.names, classes, strict=True)), images

    return run


WEB = [("0.jpg", "A"), ("0.cls", 1), ("1.png", "B"), ("1.cls", 0)]


def test_webdataset_pairs_are_honoured_not_a_class_per_tar(listed):
    pairs, images = listed({"0.tar": WEB, "1.tar": [("2.cls", "2\n"), ("2.jpeg", "C")]})
    assert pairs == {"0.jpg": "1", "1.png": "0", "2.jpeg": "2"}
    assert images.class_names == ["0", "1", "2"] and images.left_out.lines() == []


def test_webdataset_names_and_json_are_honoured(listed):
    pairs, images = listed({"0.tar": [("a/0.jpg", "A"), ("a/0.cls", "dog"), ("a/1.jpg", "B"), ("a/1.cls", "cat")]})
    assert pairs == {"a/0.jpg": "dog", "a/1.jpg": "cat"} and images.class_names == ["cat", "dog"]
    for key in ("label", "class_name", "cls"):
        pairs, _ = listed({"0.tar": [("0.jpg", "A"), ("0.json", json.dumps({"width": 3, key: "cat"}))]})
        assert pairs == {"0.jpg": "cat"}
    # timm's ImageNet has both.
    pairs, _ = listed({"0.tar": [("0.json", '{"label": 7}'), ("0.cls", 4), ("0.jpg", "A")]})
    assert pairs == {"0.jpg": "4"}


def test_a_second_image_of_a_sample_is_left_out(listed):
    pairs, images = listed({"0.tar": [("0.seg.png", "S"), *WEB, ("0.depth.png", "D"), ("1.txt", "a caption")]})
    assert pairs == {"0.jpg": "1", "1.png": "0"}
    assert sorted(line.split(":")[0] for line in images.left_out.lines()) == [
        "1 with another extension",
        "2 that are second images of a sample",
    ]
    pairs, _ = listed({"0.tar": [("0.image.jpg", "A"), ("0.cls", 1)]})
    assert pairs == {"0.image.jpg": "1"}


def test_a_sample_of_several_images_without_a_main_one_is_left_out(listed):
    pairs, images = listed({"0.tar": [*WEB, ("2.rgb.jpg", "R"), ("2.depth.png", "D"), ("2.cls", 1)]})
    assert pairs == {"0.jpg": "1", "1.png": "0"}
    assert any("2.depth.png" in line and "2.rgb.jpg" in line for line in images.left_out.lines())


def test_a_json_of_no_image_is_no_label(listed):
    pairs, _ = listed({"0.tar": [*WEB, ("meta.json", '{"label": 0.5}'), ("big.json", b" " * (2**24 + 1))]})
    assert pairs == {"0.jpg": "1", "1.png": "0"}


def test_a_sample_without_a_label_is_left_out(listed):
    _, images = listed(
        {"0.tar": [*WEB, ("2.jpg", "C"), ("3.jpg", "D"), ("3.cls", -1), ("4.jpg", "E"), ("4.json", "{")]}
    )
    assert len(images) == 2
    lines = " ".join(images.left_out.lines())
    assert "2 without a label: 2.jpg, 4.jpg" in lines and "3.jpg" in lines and "-1" in lines


@pytest.mark.parametrize(
    "cls, json_, words",
    [
        ("0.5", None, ("0.cls", "0.5")),
        ("", None, ("0.cls", "empty")),
        ("-7", None, ("0.cls", "-7")),
        (10**12, None, ("0.cls", 10**12)),
        (b"\xff\xfe", None, ("0.cls",)),
        (None, '{"label": 0.5}', ("0.json", "0.5")),
        (None, '{"label": true}', ("0.json", "True")),
        (None, '{"label": [1]}', ("0.json", "list")),
        ("cat", None, ("cat", 0)),
    ],
)
def test_a_label_that_is_no_class_is_refused(listed, mentions, cls, json_, words):
    label = ("0.cls", cls) if cls is not None else ("0.json", json_)
    with pytest.raises(UserError, match=mentions(*words)) as caught:
        listed({"0.tar": [("0.jpg", "A"), label, ("1.jpg", "B"), ("1.cls", 0)]})
    assert "\n" not in str(caught.value)


def test_webdataset_samples_without_classes_are_refused(listed, mentions):
    with pytest.raises(UserError, match=mentions("0.tar", "0.jpg", "cls", "json")):
        listed({"0.tar": [("0.jpg", "A"), ("0.txt", "a caption"), ("0.json", '{"url": "x"}')]})


def test_a_member_that_stands_twice_counts_once(listed):
    twice = [("a/0.jpg", "old"), ("b/1.jpg", "B"), ("a/0.jpg", "new")]
    pairs, images = listed({"0.tar": twice})
    assert pairs == {"a/0.jpg": "a", "b/1.jpg": "b"} and images.read(0) == b"new"
    assert any("twice" in line and "a/0.jpg" in line for line in images.left_out.lines())
    pairs, images = listed({"0.tar": [*WEB, *WEB]})
    assert len(images) == 2


def test_a_copy_in_another_tar_counts_once_and_another_image_of_that_name_counts(listed):
    _, images = listed({"0.tar": [("a/0.jpg", "A"), ("b/0.jpg", "B")], "1.tar": [("a/0.jpg", "A"), ("b/0.jpg", "C")]})
    assert [images.read(number) for number in range(len(images))] == [b"A", b"B", b"C"]
    assert any("two tar files" in line and "1.tar:a/0.jpg" in line for line in images.left_out.lines())


BOTH = [("train/cat/0.jpg", "A"), ("train/dog/1.jpg", "B"), ("val/dog/2.jpg", "C")]


@pytest.mark.parametrize("folder", ["", "imagenet/", "./", "deep/deeper/"])
def test_one_tar_with_train_and_val_obeys_the_split(listed, folder):
    files = [(folder + name, data) for name, data in BOTH]
    pairs, images = listed({"0.tar": files}, single="0.tar")
    assert pairs == {"cat/0.jpg": "cat", "dog/1.jpg": "dog"} and images.split == "train"
    for split in ("val", "validation", "test"):
        pairs, images = listed({"0.tar": files}, split, single="0.tar")
        assert pairs == {"dog/2.jpg": "dog"} and images.class_names == ["cat", "dog"] and images.split == "val"


def test_webdataset_samples_below_splits_obey_the_split(listed):
    files = [(f"{split}/{name}", data) for split in ("train", "valid") for name, data in WEB]
    pairs, images = listed({"0.tar": files}, "val")
    assert pairs == {"0.jpg": "1", "1.png": "0"} and images.split == "valid"


def test_a_tar_of_split_tars_obeys_the_split(listed):
    inner = {split: tar([("cat/0.jpg", split), ("dog/1.jpg", "B")]) for split in ("train", "val")}
    for split in inner:
        whole = {"all.tar": [(f"{split}.tar", data) for split, data in inner.items()]}
        assert listed(whole, split, single="all.tar")[1].read(0) == split.encode()


def test_labels_are_compared_with_the_training_images_in_the_same_place(listed, mentions):
    flat = [("a.jpg", "A"), ("b.jpg", "B")]
    whole = {"all.tar": [*BOTH[:2], *((f"val/{name}", data) for name, data in flat)]}
    apart = {"train.tar": [("cat/0.jpg", "C"), ("dog/1.jpg", "D")], "val.tar": flat}
    for tars, single in ((whole, "all.tar"), (apart, None)):
        pairs, images = listed(tars, "val", single, labels="dog\ndog\n")
        assert pairs == {"a.jpg": "dog", "b.jpg": "dog"} and images.class_names == ["cat", "dog"]
        with pytest.raises(ClassesDiffer, match=mentions("numbers", "cat")):
            listed(tars, "val", single, labels="1\n2\n")


def test_a_set_of_ours_keeps_the_names_of_its_classes(make, image_folder, tmp_path):
    make(image_folder, "original", out=tmp_path / "set")
    images = find_raw_images(tmp_path / "set", "train", None, tmp_path / "staging")
    assert images.class_names == ["class0", "class1", "class2"]
    assert images.labels.tolist() == [0] * 14 + [1] * 14 + [2] * 13


def test_a_missing_split_is_refused(listed, mentions):
    with pytest.raises(NoSplit, match=mentions("train", "0.tar")):
        listed({"0.tar": BOTH[:2]}, "val", single="0.tar")
    with pytest.raises(NoSplit, match=mentions("cats.tar", "val")):
        listed({"cats.tar": [("a/0.jpg", "A"), ("b/1.jpg", "B")]}, "val", single="cats.tar")
    with pytest.raises(ClassesDiffer, match=mentions("cow")):
        listed({"0.tar": [*BOTH, ("val/cow/3.jpg", "D")]}, "val", single="0.tar")


def test_the_class_is_the_first_folder_as_in_a_folder(listed):
    pairs, _ = listed({"0.tar": [("cat/day/0.jpg", "A"), ("cat/night/1.jpg", "B"), ("dog/day/2.jpg", "C")]})
    assert pairs == {"cat/day/0.jpg": "cat", "cat/night/1.jpg": "cat", "dog/day/2.jpg": "dog"}
    pairs, _ = listed({"0.tar": [("class/day/0.jpg", "A")]})
    assert pairs == {"class/day/0.jpg": "class"}
    pairs, _ = listed({"0.tar": [("n01.tar", tar([("day/0.jpg", "A"), ("1.jpg", "B")]))]})
    assert set(pairs.values()) == {"n01"}


def test_the_names_of_tars_are_splits(listed):
    tars = {
        "set-train-0.tar": [("cat/0.jpg", "A"), ("dog/0.jpg", "B")],
        "set-train-1.tar": [("cat/1.jpg", "C"), ("dog/1.jpg", "D")],
        "set-val-0.tar": [("dog/0.jpg", "E"), ("dog/2.jpg", "F")],
    }
    assert len(listed(tars)[1]) == 4
    pairs, images = listed(tars, "valid")
    assert pairs == {"dog/0.jpg": "dog", "dog/2.jpg": "dog"} and images.class_names == ["cat", "dog"]


def test_folders_of_splits_may_hold_tars(listed):
    tars = {"train/0.tar": WEB, "val/0.tar": WEB[:2]}
    assert len(listed(tars)[1]) == 2
    assert len(listed(tars, "test")[1]) == 1


def test_a_class_tar_called_train_is_a_class(listed):
    pairs, _ = listed({"train.tar": [("0.jpg", "A")], "tram.tar": [("0.jpg", "B")]})
    assert set(pairs.values()) == {"train", "tram"}


def test_imagenets_validation_tar_needs_labels(listed, mentions):
    flat = [("ILSVRC2012_val_00000002.JPEG", "B"), ("ILSVRC2012_val_00000001.JPEG", "A")]
    for name in ("ILSVRC2012_img_val.tar", "val.tar"):
        with pytest.raises(UserError, match=mentions(name, "--labels")):
            listed({name: flat}, "val", single=name)
    csv = "ImageId,PredictionString\nILSVRC2012_val_00000001,n01 1 2 3 4\nILSVRC2012_val_00000002,n02 1 2 3 4\n"
    for split in ("train", "val"):
        pairs, _ = listed({"ILSVRC2012_img_val.tar": flat}, split, "ILSVRC2012_img_val.tar", csv)
        assert pairs == {"ILSVRC2012_val_00000001.JPEG": "n01", "ILSVRC2012_val_00000002.JPEG": "n02"}


def test_labels_beside_classes_are_refused(listed, mentions):
    with pytest.raises(UserError, match=mentions("--labels", "cat", "dog")):
        listed({"0.tar": [("cat/0.jpg", "A"), ("dog/1.jpg", "B")]}, labels="cat\ndog\n")
    with pytest.raises(UserError, match=mentions("--labels", "json")):
        listed({"0.tar": WEB}, labels="cat\ndog\n")


def test_members_that_are_left_out_are_named(listed):
    odd = [
        ("a/0.jpg", "A"),
        ("a/link.jpg", tarfile.SYMTYPE),
        ("a/hard.jpg", tarfile.LNKTYPE),
        ("a/pipe.jpg", tarfile.FIFOTYPE),
        ("a/._0.jpg", "Mac"),
        ("a/notes.txt", "x"),
        ("loose.jpg", "L"),
        ("../up/3.jpg", "U"),
    ]
    pairs, images = listed({"0.tar": odd, "notes.txt": b"x"})
    assert pairs == {"a/0.jpg": "a"}
    lines = "\n".join(images.left_out.lines())
    for name in ("link.jpg", "hard.jpg", "pipe.jpg", "._0.jpg", "a/notes.txt", "loose.jpg", "../up/3.jpg", "notes.txt"):
        assert name in lines


def test_data_behind_the_end_and_a_missing_end_are_named(listed):
    one, other = tar([("a/0.jpg", "A")]), tar([("b/1.jpg", "B")])
    _, images = listed({"0.tar": one + other})
    assert "0.tar" in " ".join(line for line in images.left_out.lines() if "end mark" in line)
    _, images = listed({"0.tar": one[:1024]})
    assert "0.tar" in " ".join(line for line in images.left_out.lines() if "cut off" in line)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar", "a.zip"])
def test_a_compressed_file_is_called_by_its_name(listed, mentions, name):
    data = gzip.compress(tar(WEB)) if not name.endswith("zip") else b"PK\x03\x04" + bytes(100)
    command = "unzip" if name.endswith("zip") else "gunzip"
    with pytest.raises(UserError, match=mentions(name, "compressed", command)):
        listed({name: data}, single=name)
    if name != "a.tar":
        with pytest.raises(UserError, match=mentions(name, "unpack")):
            listed({name: data})


def test_a_pipe_called_tar_is_refused(tmp_path, mentions):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(UserError, match=mentions("a.tar", "regular")):
        find_raw_images(tmp_path, "train", None, tmp_path / "staging")
    with pytest.raises(UserError, match=mentions("a.tar", "regular")):
        find_raw_images(tmp_path / "a.tar", "train", None, tmp_path / "staging")


def test_splits_below_classes_are_refused_and_what_belongs_to_no_split_is_named(listed, mentions):
    with pytest.raises(UserError, match=mentions("cat", "train", "val")):
        listed({"0.tar": [("cat/train/0.jpg", "A"), ("cat/val/1.jpg", "B"), ("dog/2.jpg", "C")]})
    _, images = listed({"0.tar": [("train/a/0.jpg", "A"), ("val/a/1.jpg", "B"), ("more/a/2.jpg", "C")]})
    assert images.left_out.lines() == ["1 that belong to no split: more/a/2.jpg"]


def test_labels_in_another_tar_or_of_other_names_are_not_overlooked(listed, mentions):
    with pytest.raises(UserError, match=mentions("0.jpg", "another")):
        listed({"images.tar": [("0.jpg", "A")], "labels.tar": [("0.cls", 1)]})
    with pytest.raises(UserError, match=mentions("0.input.jpg", "--labels")):
        listed({"0.tar": [("0.input.jpg", "A"), ("0.target.cls", 1)]})


def test_hidden_files_and_folders_called_tar_are_no_tars(listed):
    pairs, _ = listed(
        {"._cat.tar": b"a Mac's", "cat.TAR": [("0.jpg", "A")], "x.tar/note.txt": b"", "dog.tar": [("1.jpg", "B")]}
    )
    assert set(pairs.values()) == {"cat", "dog"}
