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


def test_the_folder_around_the_classes_is_said(listed):
    pairs, images = listed({"0.tar": [("cat/day1/0.jpg", "A"), ("cat/day2/1.jpg", "B")]})
    assert set(pairs.values()) == {"day1", "day2"}
    (note,) = images.notes
    assert "the folder cat," in note and "classes" in note
    _, images = listed({"0.tar": [("cat/day1/0.jpg", "A")]})
    assert "one class, cat" in images.notes[0] and "day1" in images.notes[0]
    for files in ([("cat/0.jpg", "A"), ("dog/1.jpg", "B")], [(f"x/{name}", data) for name, data in BOTH], WEB):
        assert listed({"0.tar": files})[1].notes == []


def test_members_of_a_system_are_left_out(listed):
    odd = ["__MACOSX/cat/0.jpg", "cat/@eaDir/0.jpg/thumbnail.jpg", "lost+found/1.jpg"]
    pairs, images = listed({"0.tar": [("cat/0.jpg", "A"), ("dog/1.jpg", "B"), *((name, "X") for name in odd)]})
    assert set(pairs) == {"cat/0.jpg", "dog/1.jpg"}
    assert images.left_out.lines() == [f"3 of a system or a tool, such as thumbnails: {', '.join(odd)}"]


@pytest.mark.parametrize("names", ["train2017 val2017 unlabeled2017", "train hold-out", "test trainval"])
def test_folders_that_look_like_splits_are_no_classes(listed, mentions, names):
    files = [(f"{name}/{class_name}/0.jpg", name + class_name) for name in names.split() for class_name in "ab"]
    with pytest.raises(UserError, match=mentions(names.split()[0])):
        listed({"0.tar": files})


def test_a_tar_that_names_no_split_beside_one_that_does_is_refused(listed, mentions):
    for files in (WEB, [("a/0.jpg", "A"), ("b/1.jpg", "B")]):
        with pytest.raises(UserError, match=mentions("set-train-0.tar", "set-more-0.tar")):
            listed({"set-train-0.tar": files, "set-more-0.tar": [(f"x{name}", data) for name, data in files]})


def test_classes_that_belong_to_no_image_are_not_overlooked(listed, mentions):
    with pytest.raises(UserError, match=mentions("0.tar", "x", ".cls")):
        listed({"0.tar": [("X.jpg", "A"), ("x.cls", 1)]})
    for folder in ("a", "b"):
        with pytest.raises(UserError, match=mentions("0.tar", "a/0", ".cls")):
            listed({"0.tar": [("a/0.v2.jpg", "A"), ("a/0.v2.cls", 1), (f"{folder}/1.v2.jpg", "B")]})
    _, images = listed({"0.tar": [*WEB, ("9.cls", 3), ("8.tiff", "T"), ("8.cls", 3)]})
    assert "2 with the class of no image: 0.tar:9.cls, 0.tar:8.cls" in images.left_out.lines()


def test_a_few_labels_among_class_folders_are_refused(listed, mentions):
    plain = [(f"{name}/{number}.jpg", f"{name}{number}") for name in "ab" for number in range(3)]
    with pytest.raises(UserError, match=mentions("0.tar", "a/0", "a/1", "folders")):
        listed({"0.tar": [*plain, ("a/0.json", '{"category": "photo"}')]})


def test_two_classes_of_one_image_are_refused_or_said(listed, mentions):
    with pytest.raises(UserError, match=mentions("0.jpg", "0.tar", "1.tar", 4, 5)):
        listed({"0.tar": [("0.jpg", "A"), ("0.cls", 4)], "1.tar": [("0.jpg", "A"), ("0.cls", 5)]})
    pair = [("0.cls", 4), ("0.json", '{"label": 7}')]
    for files in (pair, pair[::-1]):
        pairs, images = listed({"0.tar": [("0.jpg", "A"), *files]})
        assert pairs == {"0.jpg": "4"} and ".json" in images.notes[0]
        assert images.left_out.lines() == []
    _, images = listed({"0.tar": [("0.jpg", "A"), ("0.cls", 0), ("0.json", '{"class_name": "tench"}')]})
    assert images.notes == []
    pairs, images = listed({"0.tar": [("0.jpg", "A"), ("0.cls", 4), ("0.cls", 5)]})
    assert pairs == {"0.jpg": "5"} and any("twice" in line for line in images.left_out.lines())


def test_a_mark_at_the_start_of_a_text_is_no_part_of_the_class(listed):
    for label in (("0.cls", b"\xef\xbb\xbf1\r\n"), ("0.json", b'\xef\xbb\xbf{"label": 1}')):
        assert listed({"0.tar": [("0.jpg", "A"), label]})[0] == {"0.jpg": "1"}


@pytest.mark.parametrize("inner", [False, True])
def test_a_damaged_header_is_no_end(listed, mentions, inner):
    whole = bytearray(tar([(f"a/{number}.jpg", bytes(600)) for number in range(3)]))
    whole[2 * 1536 + 150] ^= 1  # in the checksum of the third header
    data = tar([("n01.tar", bytes(whole)), ("n02.tar", tar([("b/0.jpg", "B")]))]) if inner else bytes(whole)
    with pytest.raises(UserError, match=mentions("0.tar", "damaged", *(["n01.tar"] if inner else []))):
        listed({"0.tar": data})


def test_an_inner_tar_without_an_end_or_with_data_behind_it_is_named(listed):
    one = tar([("0.jpg", "A")])
    _, images = listed({"0.tar": [("n01.tar", one[:1024]), ("n02.tar", one + one), ("n03.tar", b"")]})
    lines = " ".join(images.left_out.lines())
    assert "n01.tar in 0.tar" in lines and "n02.tar in 0.tar" in lines and "n03.tar in 0.tar" in lines


def test_a_compressed_inner_tar_is_called_by_its_name(listed, mentions):
    with pytest.raises(UserError, match=mentions("n01.tar in 0.tar", "gunzip")):
        listed({"0.tar": [("n01.tar", gzip.compress(bytes(9999))), ("n02.tar", tar([("0.jpg", "B")]))]})


def test_missing_parts_are_said(listed):
    part = [("a/0.jpg", "A"), ("b/1.jpg", "B")]
    _, images = listed({"x-train-00000-of-00003.tar": part, "x-train-00002-of-00003.tar": [("b/2.jpg", "C")]})
    assert any("1 of 3" in note and "x-train-*" in note for note in images.notes)


def test_held_out_images_that_are_among_the_training_images_are_named(listed):
    train, val = ([(f"{name}/{i}.jpg", f"{name}{i}{more}") for name in "ab" for i in range(20)] for more in "-x")
    val[:20] = train[:20]
    apart = {"train.tar": train, "val.tar": val}
    whole = {
        "all.tar": [(f"{split}/{path}", data) for split in ("train", "val") for path, data in apart[f"{split}.tar"]]
    }
    for tars in (apart, whole):
        (note,) = listed(tars, "val")[1].notes
        assert "WARNING" in note and "8 of 16" in note and "a/0.jpg" in note
        assert listed(tars)[1].notes == []
    assert listed(apart | {"val.tar": val[20:]}, "val")[1].notes == []


def test_classes_without_images_are_said(listed):
    _, images = listed({"0.tar": [("0.jpg", "A"), ("0.cls", 1), ("1.jpg", "B"), ("1.cls", 2)]})
    assert images.notes == ["WARNING: 1 of 3 classes have no images, first 0; do the numbers start at 1?"]
    _, images = listed({"0.tar": [("0.jpg", "A"), ("0.cls", 0), ("1.jpg", "B"), ("1.cls", 2000)]})
    assert images.notes == ["WARNING: 1,999 of 2,001 classes have no images, first 1, 2, 3"]


def test_a_test_split_without_classes_gives_way_to_validation_as_in_a_folder(listed, mentions):
    whole = {"all.tar": [*BOTH, ("test/9.jpg", "T")]}
    apart = {
        "train.tar": [("cat/0.jpg", "A"), ("dog/1.jpg", "B")],
        "val.tar": [("dog/2.jpg", "C")],
        "test.tar": WEB[:1],
    }
    for tars in (whole, apart):
        pairs, images = listed(tars, "test")
        assert pairs == {"dog/2.jpg": "dog"} and images.split == "val"
        assert any("without labels: test" in line for line in images.left_out.lines())
    with pytest.raises(UserError, match=mentions("--labels")):
        listed({"train.tar": apart["train.tar"], "test.tar": WEB[:1]}, "test")


def test_one_class_of_several_tars_is_said(listed):
    pairs, images = listed({"n01.tar": [("images/0.jpg", "A")], "n02.tar": [("images/1.jpg", "B")]})
    assert set(pairs.values()) == {"images"} and "2 tar files" in images.notes[0] and "images" in images.notes[0]


def test_an_error_says_what_was_left_out(listed, mentions):
    with pytest.raises(UserError, match=mentions("no images", "../up/0.jpg")):
        listed({"0.tar": [("../up/0.jpg", "A")]})
