"""Parquet files: columns, labels of every type, splits, names of classes, rows that are left out."""

import json
import os
import shutil

import pytest

from unite_fast.data_pipeline.shards.raw_images import find_raw_images
from unite_fast.data_pipeline.splits import ClassesDiffer
from unite_fast.errors import UserError

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
from pyarrow import parquet  # noqa: E402

from unite_fast.data_pipeline.shards.parquet_files import Columns  # noqa: E402  # imports pyarrow when it is used


@pytest.fixture
def listed(tmp_path):
    """Writes files of columns and lists them: classes of the images, and the listing."""

    def run(files, split="train", columns=None, names=None, labels=None):
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        for name, table in files.items():
            path = tmp_path / "set" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            table = pyarrow.table(table)
            own = names(name) if callable(names) else names
            if own:
                info = {"info": {"features": {"label": {"names": own}}}}
                table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
            parquet.write_table(table, path)
        images = find_raw_images(tmp_path / "set", split, labels, tmp_path / "staging", columns)
        return [images.class_names[label] for label in images.labels.tolist()], images

    return run


def rows(labels, **more):
    return {"image": [f"{number}".encode() for number in range(len(labels))], "label": labels, **more}


@pytest.mark.parametrize(
    "labels, classes",
    [
        ([1, 0], ["1", "0"]),
        ([1.0, 0.0], ["1", "0"]),
        (["dog", "cat"], ["dog", "cat"]),
        (["10", "9", "-1"], ["10", "9"]),
    ],
)
def test_numbers_and_names_are_labels(listed, labels, classes):
    assert listed({"train.parquet": rows(labels)})[0] == classes


def test_a_dictionary_of_names_is_read(listed):
    assert listed({"a.parquet": rows(pyarrow.array(["b", "a"]).dictionary_encode())})[0] == ["b", "a"]


@pytest.mark.parametrize(
    "labels, words",
    [
        ([0.5, 1.0], ("a.parquet:0", 0.5)),
        ([True, False], ("label", "bool")),
        ([-7, 1], ("a.parquet:0", -7)),
        ([10**12, 1], ("a.parquet:0", 10**12)),
        ([[1], [2]], ("label", "list")),
        ([b"a", b"b"], ("label", "binary")),
        (["", "a"], ("a.parquet:0", "empty")),
        ([float("nan"), 1.0], ("a.parquet:0", "nan")),
    ],
)
def test_a_label_that_is_no_class_is_refused(listed, mentions, labels, words):
    with pytest.raises(UserError, match=mentions(*words)) as caught:
        listed({"a.parquet": rows(labels)})
    assert "\n" not in str(caught.value)


def test_rows_without_label_or_image_are_left_out_and_named(listed):
    table = {
        "image": [{"bytes": b"A"}, {"bytes": b"B"}, {"bytes": None}, None, {"bytes": b""}, {"bytes": b"F"}],
        "label": [1, None, 0, 0, 0, -1],
    }
    classes, images = listed({"a.parquet": table}, names=["x", "y"])
    assert classes == ["y"] and images.read(0) == b"A" and images.class_names == ["x", "y"]
    assert [line.split(":")[0][0] for line in images.left_out.lines()] == ["3", "1", "1"]
    assert all("a.parquet:" in line for line in images.left_out.lines())


def test_a_null_in_the_middle_moves_no_image(listed):
    table = {"image": [b"A", None, b"CCC"], "label": [0, 1, 2]}
    classes, images = listed({"a.parquet": table})
    assert [images.read(0), images.read(1)] == [b"A", b"CCC"] and classes == ["0", "2"]


def test_columns_of_other_names_can_be_named(listed, mentions):
    table = {"img": [b"A"], "coarse": [3], "fine": [4]}
    with pytest.raises(UserError, match=mentions("a.parquet", "label", "coarse", "fine")):
        listed({"a.parquet": table})
    assert listed({"a.parquet": table}, columns=Columns("", "fine"))[0] == ["4"]
    assert listed({"a.parquet": table}, columns=Columns("img", "coarse"))[0] == ["3"]
    with pytest.raises(UserError, match=mentions("x", "img")):
        listed({"a.parquet": table}, columns=Columns("x", "fine"))
    with pytest.raises(UserError, match=mentions("image", "img", "--image-column")):
        listed({"a.parquet": {**rows([0]), "img": [b"B"]}})


def test_an_image_column_without_images_is_refused(listed, mentions):
    for values in (["text"], [[1, 2]], [{"path": "a.jpg"}]):
        with pytest.raises(UserError, match=mentions("image", "a.parquet")):
            listed({"a.parquet": {"image": values, "label": [0]}})


def test_test_files_without_labels_are_in_no_ones_way(listed, mentions):
    files = {"train-0.parquet": rows([0, 1]), "test-0.parquet": rows([-1, -1, -1])}
    assert len(listed(files)[1]) == 2
    with pytest.raises(UserError, match=mentions("-1", "test-0.parquet:0")):
        listed(files, "test")
    files["validation-0.parquet"] = rows([1])
    for split in ("val", "test"):
        classes, images = listed(files, split)
        assert classes == ["1"] and images.split == "validation"
    assert any("test-0.parquet" in line for line in images.left_out.lines())


def test_splits_are_in_the_names_of_files_and_folders(listed):
    for names in (("x-training-0.parquet", "x-dev-0.parquet"), ("train/0.parquet", "sub/valid/0.parquet")):
        files = {names[0]: rows([0, 1, 2]), names[1]: rows([1])}
        assert len(listed(files)[1]) == 3
        assert listed(files, "val")[1].class_names == ["0", "1", "2"]


def test_classes_that_do_not_match_are_refused(listed, mentions):
    files = {"train-0.parquet": rows([0, 1]), "val-0.parquet": rows([1])}
    swapped = {"train-0.parquet": ["a", "b"], "val-0.parquet": ["b", "a"]}
    with pytest.raises(ClassesDiffer, match=mentions("train-0.parquet")):
        listed(files, "val", names=swapped.get)
    with pytest.raises(UserError, match=mentions("a.parquet", "b.parquet")):
        listed({"a.parquet": rows([0]), "b.parquet": rows([1])}, names=lambda name: ["x", name])


def test_names_and_labels_that_do_not_match_are_refused(listed, mentions):
    with pytest.raises(UserError, match=mentions(5, "0..1")):
        listed({"a.parquet": rows([0, 5])}, names=["x", "y"])
    with pytest.raises(UserError, match=mentions("a.parquet", "twice")):
        listed({"a.parquet": rows([0, 1])}, names=["x", "x"])


def test_options_that_do_not_fit_are_refused(listed, tmp_path, mentions):
    with pytest.raises(UserError, match=mentions("--labels")):
        listed({"a.parquet": rows([0])}, labels=tmp_path / "labels.txt")
    (tmp_path / "folder" / "a").mkdir(parents=True)
    (tmp_path / "folder" / "a" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match=mentions("--image-column")):
        find_raw_images(tmp_path / "folder", "train", None, tmp_path / "staging", Columns("img"))


def test_a_changed_file_is_copied_again(listed):
    files = {"a.parquet": {"image": [b"AA"], "label": [0]}}
    assert listed(files)[1].read(0) == b"AA"
    assert listed({"a.parquet": {"image": [b"BB"], "label": [0]}})[1].read(0) == b"BB"


def test_a_pipe_is_refused(tmp_path, mentions):
    os.mkfifo(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=mentions("a.parquet", "regular")):
        find_raw_images(tmp_path, "train", None, tmp_path / "staging")


def test_a_folder_of_parts_may_be_called_parquet_and_hidden_files_are_left_out(listed, tmp_path):
    files = {"a.parquet/part-0.snappy.parquet": rows([0]), "b.PARQUET": rows([1]), ".cache/c.parquet": rows([2])}
    assert listed(files)[0] == ["0", "1"]
    assert listed({"a.parquet": rows([0]), "._a.parquet": rows([5])})[0] == ["0"]


def test_folders_of_a_system_hold_no_parts_and_what_lies_beside_the_files_is_named(listed, tmp_path):
    files = {"train-0.parquet": rows([0]), "@eaDir/train-1.parquet": rows([1]), "__MACOSX/train-0.parquet": rows([1])}
    labels, images = listed(files)
    assert labels == ["0"]
    assert images.left_out.lines() == ["2 beside the files that are read: @eaDir, __MACOSX"]


def test_a_file_that_names_no_split_is_not_read_beside_one_that_does(listed):
    labels, images = listed({"train-0.parquet": rows([0]), "extra-0.parquet": rows([1])})
    assert labels == ["0"]
    assert images.left_out.lines() == ["1 that belong to no split: extra-0.parquet"]


def test_a_test_file_without_a_column_of_labels_gives_way_to_validation(listed):
    files = {"train.parquet": rows([0, 1]), "test.parquet": {"image": [b"0"]}, "validation.parquet": rows([1])}
    labels, images = listed(files, "test")
    assert labels == ["1"] and images.split == "validation"


@pytest.mark.parametrize("label", ["a\nb", "c\0d", "e" * 1001, "\u202ecat", "\ufeffcat"])
def test_text_that_is_no_name_is_refused(listed, mentions, label):
    with pytest.raises(UserError, match=mentions("train.parquet:1", "label")) as caught:
        listed({"train.parquet": rows(["a", label])})
    assert str(caught.value).isprintable()


def test_spaces_around_a_name_make_no_class_and_other_likeness_is_said(listed):
    labels, images = listed({"train.parquet": rows(["cat", "cat ", "Cat"])})
    assert labels == ["cat", "cat", "Cat"]
    assert "'Cat' and 'cat'" in " ".join(images.notes)


def test_a_damaged_page_with_a_checksum_is_noticed(tmp_path, mentions):
    path = tmp_path / "train.parquet"
    table = pyarrow.table(rows(list(range(100))))
    parquet.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    place = data.index((41).to_bytes(8, "little") + (42).to_bytes(8, "little"))
    data[place] = 7
    path.write_bytes(data)
    with pytest.raises(UserError, match=mentions("train.parquet", "CRC")):
        find_raw_images(tmp_path, "train", None, tmp_path / "staging")


def test_a_folder_that_cannot_be_listed_is_an_error(listed, tmp_path, monkeypatch, mentions):
    listed({"a.parquet": rows([0]), "more/b.parquet": rows([1])})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=mentions("more", "Permission denied")):
        find_raw_images(tmp_path / "set", "train", None, tmp_path / "staging")
