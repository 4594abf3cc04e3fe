"""Values of a trainer's state that no trainer saves."""

import re
from pathlib import Path

import pytest

from unite_fast.checkpoint.progress import check_progress, class_names
from unite_fast.errors import UserError

GOOD = {
    "averages": {"sums": [0.5, 1, -2.0], "count": 3},
    "loader": {"batch": 4, "skipped": [["a\udcff.jpg", "no image"]]},
    "decoder": "pillow",
    "attention": "sdpa_bfloat16",
    "skipped_steps": 0,
}


def test_what_trainers_save_is_accepted():
    check_progress(GOOD, Path("run"))
    check_progress(GOOD | {"data": {"of": "a later version"}}, Path("run"))
    check_progress({}, Path("run"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("averages", {"sums": sums, "count": 3}) for sums in ([], ["1"], [True], "1,2", None, {"0": 1}, [0] * 101)),
        *(("averages", {"sums": [1.0], "count": count}) for count in (-1, 1.5, "1_0", True, 2**31, 10**30, None)),
        *(("averages", value) for value in ([], "x", {}, {"sums": [1.0]})),
        *(("loader", {"batch": batch, "skipped": []}) for batch in (-1, 1.5, "3", "\u0663", 2**31, 10**30, None)),
        *(
            ("loader", {"batch": 1, "skipped": pairs})
            for pairs in ("ab", {}, ["ab"], [["a"]], [["a", 3]], [[["a"], "b"]])
        ),
        *(("loader", value) for value in ([], 3, "x", {})),
        *(("decoder", value) for value in (3, [], {}, "x" * 101)),
        *(("attention", value) for value in (3, [], {}, "", "os", "flash_attn.evil")),
        *(("skipped_steps", value) for value in (-1, 0.5, "1", [], 2**31)),
    ],
)
def test_other_values_are_refused_by_name(key, value):
    with pytest.raises(UserError, match=rf"the progress in run cannot be read: {re.escape(key)}") as refusal:
        check_progress(GOOD | {key: value}, Path("run"))
    assert "\n" not in str(refusal.value)


def test_the_names_of_the_classes_are_read_if_they_are_there():
    assert class_names({"data": {"classes": [["a\udcff", 3], ["b", 1]], "samples": 4}}) == ["a\udcff", "b"]
    for other in ({}, {"data": None}, {"data": {"of": "a later version"}}, {"data": {"classes": [["a", "b"]]}}):
        assert class_names(other) == []
