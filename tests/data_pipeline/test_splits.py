"""The names of splits and the comparison of class names."""

import pytest

from unite_fast.data_pipeline.splits import (
    HELD_OUT,
    ClassesDiffer,
    NoSplit,
    check_same_classes,
    choose_split,
    find_splits,
    is_held_out,
    renumber,
    split_of_name,
    training_folder,
    words_of,
)
from unite_fast.errors import UserError


@pytest.mark.parametrize(
    "names, splits",
    [
        (["train", "val"], ["train", "val"]),
        (["training", "testing"], ["training", "testing"]),
        (["Train", "Valid", "annotations"], ["Train", "Valid"]),
        (["train", "validation", "test", "class"], ["train", "validation", "test"]),
        (["val"], ["val"]),
        (["dev", "train"], ["dev", "train"]),
        (["train", "tram"], []),
        (["test", "tube", "train_station"], []),
        (["a", "b"], []),
        ([], []),
    ],
)
def test_splits_are_all_names_or_training_beside_a_held_out_split(names, splits):
    assert sorted(find_splits(names).values()) == sorted(splits)


def test_names_that_differ_in_case_are_refused(mentions):
    with pytest.raises(UserError, match=mentions("Train", "train")):
        find_splits(["train", "Train", "val"])


@pytest.mark.parametrize(
    "there, split, chosen",
    [
        ("train val test", "train", "train"),
        ("train val test", "val", "val"),
        ("train val test", "validation", "val"),
        ("train valid", "VAL", "valid"),
        ("train val validation", "validation", "validation"),
        ("train val test", "test", "test"),
        ("train val", "test", "val"),
        ("train val test", HELD_OUT, "val"),
        ("train testing", HELD_OUT, "testing"),
        ("training eval", "train", "training"),
    ],
)
def test_a_split_is_found_by_its_other_names(there, split, chosen):
    assert choose_split({name: name for name in there.split()}, split, "here") == chosen


@pytest.mark.parametrize("there, split", [("train test", "val"), ("val test", "train"), ("train", HELD_OUT)])
def test_a_missing_split_is_named(there, split, mentions):
    with pytest.raises(NoSplit, match=mentions("here", *there.split())):
        choose_split({name: name for name in there.split()}, split, "here")


def test_unknown_words_are_refused(mentions):
    with pytest.raises(UserError, match=mentions("'all'", "train", "val", "test")):
        words_of("all")
    assert is_held_out("valid") and not is_held_out("training") and not is_held_out("cat")


@pytest.mark.parametrize(
    "name, word",
    [
        ("train-00000-of-00005", "train"),
        ("imagenet1k-validation-07", "validation"),
        ("ILSVRC2012_img_val", "val"),
        ("n01440764", ""),
        ("trainer", ""),
        ("train_val", ""),
        ("contest", ""),
    ],
)
def test_a_file_name_has_a_word_for_its_split(name, word):
    assert split_of_name(name) == word


def test_the_training_folder_of_a_held_out_split(tmp_path, mentions):
    for name in ("Training", "val"):
        (tmp_path / name).mkdir()
    splits = {"training": "Training", "val": "val", "test": "test"}
    assert training_folder(tmp_path, splits, "val") == tmp_path / "Training"
    assert training_folder(tmp_path, splits, "Training") is training_folder(tmp_path, {"val": "val"}, "val") is None
    (tmp_path / "test").symlink_to(tmp_path / "Training")
    with pytest.raises(UserError, match=mentions("test", "Training", "link")):
        training_folder(tmp_path, splits, "test")


def test_held_out_classes_get_the_labels_of_training(mentions):
    assert renumber(["c", "a"], ["a", "b", "c"], "val", "train") == [2, 0]
    with pytest.raises(ClassesDiffer, match=mentions(2, 1, "n0", "train")) as caught:
        renumber(["1", "2", "n0"], ["n0", "n1"], "val", "train")
    assert "numbers" in str(caught.value)
    with pytest.raises(ClassesDiffer, match=mentions("a/x", "train")):
        renumber(["a/x"], ["b"], "val", "train")


def test_the_same_classes_in_another_order_are_refused(mentions):
    check_same_classes(["a", "b"], ["a", "b"], "val", "train")
    for classes in (["b", "a"], ["a"], ["a", "z"]):
        with pytest.raises(ClassesDiffer, match=mentions("val", "train")):
            check_same_classes(classes, ["a", "b"], "val", "train")


@pytest.mark.parametrize("names", ["train2017 val2017", "test_set train_set", "train-a train-b valid-a"])
def test_names_that_only_contain_the_words_are_refused(mentions, names):
    with pytest.raises(UserError, match=mentions(*names.split())):
        find_splits(names.split())
    assert find_splits([*names.split(), "cat"]) == {}
