"""The names of splits and the comparison of class names."""

import pytest

from unite_fast.data_pipeline.splits import (
    HELD_OUT,
    ClassesDiffer,
    NoSplit,
    check_no_split_is_a_class,
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
        (["holdout", "train"], ["holdout", "train"]),
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


@pytest.mark.parametrize("names", ["train2017 val2017", "test_set train_set", "train-a valid-a", "holdout1 Train1"])
def test_names_that_differ_only_in_the_words_are_refused_whatever_else_is_there(mentions, names):
    for more in ([], ["cat"], ["annotations", "unlabeled2017"]):
        with pytest.raises(UserError, match=mentions(*names.split())):
            find_splits([*names.split(), *more])


def test_classes_whose_names_contain_the_words_are_classes(mentions):
    assert find_splits(["train_station", "test_tube", "cat"]) == {}
    with pytest.raises(UserError, match=mentions("train_x", "val_y")):
        find_splits(["train_x", "val_y"])


def test_a_class_that_looks_like_a_split_is_refused(mentions):
    for name in ("train", "Test", "holdout"):
        with pytest.raises(UserError, match=mentions(name, "here", "cat")):
            check_no_split_is_a_class(name, ["dog", "cat"], False, "here")
    check_no_split_is_a_class("train", [], True, "here")
    check_no_split_is_a_class("train", ["night"], True, "here")
    check_no_split_is_a_class("tram", ["night"], False, "here")
