"""Notes on sets of parts."""

from pathlib import Path

import pytest

from unite_fast.data_pipeline.shards.parts import notes_on_parts


def notes(*names):
    return notes_on_parts([Path("set", name) for name in names], Path("set"))


@pytest.mark.parametrize(
    "names, words",
    [
        (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"], ["1 of 3", "train-*", ": 1"]),
        (["a-1-of-3.tar", "a-3-of-3.tar"], ["1 of 3", ": 2"]),
        (["x_0_of_9.tar"], ["8 of 9", "1, 2, 3, ..."]),
        (["train-00001-of-00002-0a1b2c3d4e5f6071.parquet"], ["1 of 2", ": 0"]),
        (["t-000000.tar", "t-000001.tar", "t-000003.tar"], ["t-000000", "t-000003", "1 ", ": 2"]),
        (["0.parquet", "1.parquet", "2.parquet", "5.parquet"], ["2 are missing", "3, 4"]),
        (["train-0-of-1.parquet", "train-0-of-2.parquet", "train-1-of-2.parquet"], ["several sets", "of 1, 2"]),
        (["default/0.parquet", "small/0.parquet"], ["2 folders", "default, small"]),
    ],
)
def test_what_is_missing_or_mixed_is_said(names, words):
    (note,) = notes(*names)
    assert all(word in note for word in words), note


@pytest.mark.parametrize(
    "names",
    [
        ["train-0-of-2.parquet", "train-1-of-2.parquet", "val-0-of-1.parquet"],
        ["a-1-of-2.tar", "a-2-of-2.tar"],
        ["n01440764.tar", "n01443537.tar", "n01484850.tar"],
        ["cat.tar", "dog.tar"],
        ["set2.tar"],
        ["train-0-of-99999999999.parquet"],
        ["a-0.tar", "a-999999999.tar"],
        [],
    ],
)
def test_whole_sets_and_other_names_need_no_note(names):
    assert notes(*names) == []
