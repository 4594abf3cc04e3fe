"""A resumed run knows its training data."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from unite_fast.checkpoint.model_file import describe
from unite_fast.cli import app
from unite_fast.data_pipeline import open_source
from unite_fast.distributed.launch import join_training
from unite_fast.distributed.process_group import ALONE
from unite_fast.errors import UserError
from unite_fast.recipes import load_config
from unite_fast.training.data_record import CHANGES, KEY, DataRecord, check_same_data
from unite_fast.training.trainer import train


def _record(samples: int = 5, classes: tuple = (("cat", 2), ("dog", 3)), listing: str = "a") -> DataRecord:
    return DataRecord(samples, list(classes), listing)


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (_record(6, (("cat", 2), ("dog", 4))), "dog"),
        (_record(classes=(("dog", 2), ("cat", 3))), "class 0"),
        (_record(classes=(("cat", 5),)), "1 classes"),
        (_record(6), "6 images"),
        (_record(listing="b"), "contents"),
    ],
)
def test_each_difference_stops_a_resume_and_is_named(other, word):
    progress = {KEY: json.loads(json.dumps(_record().tree()))}
    assert check_same_data(progress, _record(), 3, allowed=False) == ([], "")
    with pytest.raises(UserError, match=f"{word}.*--allow-change"):
        check_same_data(progress, other, 3, allowed=False)
    (change,), line = check_same_data(progress, other, 3, allowed=True)
    assert (change["step"], change["key"], change["before"], change["after"]) == (3, KEY, "a", other.listing)
    assert word in line
    assert word in change["difference"]


def test_an_allowed_change_stays_recorded():
    (change,), _ = check_same_data({KEY: _record().tree()}, _record(listing="b"), 3, allowed=True)
    progress = {KEY: _record(listing="b").tree(), CHANGES: [change]}
    assert check_same_data(progress, _record(listing="b"), 9, allowed=False)[0] == [change]
    assert len(check_same_data(progress, _record(listing="c"), 9, allowed=True)[0]) == 2


def test_an_older_checkpoint_is_resumed_with_a_line():
    changes, line = check_same_data({}, _record(), 3, allowed=False)
    assert changes == []
    assert line


@pytest.mark.parametrize("tree", [{}, {"samples": "x"}, {"samples": 1, "classes": [1], "listing": ""}, [], 3])
def test_a_broken_record_is_one_error(tree):
    with pytest.raises(UserError):
        check_same_data({KEY: tree}, _record(), 3, allowed=True)


def _make_images(folder: Path, make_image, names: dict[str, int]) -> None:
    for class_name, count in names.items():
        (folder / class_name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            make_image(folder / class_name / f"{number}.png")


@pytest.fixture
def make_image():

    def make(path: Path) -> None:
        Image.new("RGB", (9, 9), (hash(path.name) % 255, 7, 7)).save(path)

    return make


def test_a_run_on_a_folder_notices_other_images(tiny_run, tmp_path, make_image):
    data = tmp_path / "data"
    _make_images(data, make_image, {"cat": 3, "dog": 3})
    words = (
        *tiny_run,
        "data.source=folder",
        f"data.path={data}",
        "model.num_classes=2",
        f"train.out={tmp_path / 'run'}",
    )
    train(load_config("digits", (*words, "train.steps=1")))
    train(load_config("digits", (*words, "train.steps=2")), resume=True)

    make_image(data / "dog" / "9.png")
    with pytest.raises(UserError, match="'dog' has 4 images instead of 3"):
        train(load_config("digits", (*words, "train.steps=3")), resume=True)
    (data / "dog" / "9.png").unlink()

    # The same data in another place are the same data.
    data.rename(tmp_path / "moved")
    moved = (*words, f"data.path={tmp_path / 'moved'}")
    train(load_config("digits", (*moved, "train.steps=3")), resume=True)

    (tmp_path / "moved" / "dog" / "0.png").rename(tmp_path / "moved" / "dog" / "00.png")
    with pytest.raises(UserError, match="names"):
        train(load_config("digits", (*moved, "train.steps=4")), resume=True)
    train(load_config("digits", (*moved, "train.steps=4")), resume=True, allow_change=("data",))
    saved = json.loads((tmp_path / "run/checkpoints/latest/checkpoint.json").read_text())["content"]["progress"]
    assert [change["step"] for change in saved[CHANGES]] == [3]
    assert "changed after step 3: 'data'" in describe(tmp_path / "run")
    train(load_config("digits", (*moved, "train.steps=5")), resume=True)
    saved = json.loads((tmp_path / "run/checkpoints/latest/checkpoint.json").read_text())["content"]["progress"]
    assert [change["step"] for change in saved[CHANGES]] == [3]


@pytest.mark.parametrize("words", [["--allow-change", "data"], ["--resume", "--allow-change", "batch"]])
def test_the_option_is_for_resuming_and_for_data(words):
    result = CliRunner().invoke(app, ["train", "digits", *words])
    assert isinstance(result.exception, UserError)
    assert "--allow-change" in str(result.exception)


def test_pixels_and_labels_of_digits_are_in_the_fingerprint():
    source = open_source("digits", "", 8, "train")
    before = DataRecord.of(source, ALONE)
    source.images[5, 3, 3] += 1
    assert DataRecord.of(source, ALONE).difference(before)
    source.images[5, 3, 3] -= 1
    assert not DataRecord.of(source, ALONE).difference(before)
    source.labels[[0, 1]] = source.labels[[1, 0]]
    assert DataRecord.of(source, ALONE).difference(before)


def _digits_of_rank() -> str:
    with join_training("cpu", 3) as (ranks, _, _):
        try:
            DataRecord.of(open_source("digits", "", 8, "train" if ranks.main else "test"), ranks)
        except UserError as error:
            return str(error)
    return ""


def test_ranks_with_other_data_are_refused(ranks):
    messages = ranks(2, _digits_of_rank)
    assert all("rank 1" in message for message in messages)


def test_a_class_name_that_is_no_text_is_the_same_data(tmp_path, make_image):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    _make_images(tmp_path, make_image, {folder.name: 2})
    record = DataRecord.of(open_source("folder", str(tmp_path), 8, "train", 1), ALONE)
    progress = {KEY: json.loads(json.dumps(record.tree()))}
    assert check_same_data(progress, record, 3, allowed=False) == ([], "")


def test_any_two_images_of_a_small_folder_that_change_places_are_noticed(tmp_path):

    names = [tmp_path / kind / f"{number}.png" for kind in ("cat", "dog") for number in range(4)]
    for number, name in enumerate(names):
        name.parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), (number, 7, 7)).save(name)
    before = DataRecord.of(open_source("folder", str(tmp_path), 8, "train", 2), ALONE)
    os.utime(names[3])
    assert not DataRecord.of(open_source("folder", str(tmp_path), 8, "train", 2), ALONE).difference(before)
    content = names[3].read_bytes()
    names[3].write_bytes(names[6].read_bytes())
    names[6].write_bytes(content)
    assert DataRecord.of(open_source("folder", str(tmp_path), 8, "train", 2), ALONE).difference(before)


@pytest.mark.parametrize("changes", [5, None, "x", [5], {"a": 1}])
def test_a_broken_list_of_changes_is_one_error(changes):
    with pytest.raises(UserError, match="changes"):
        check_same_data({KEY: _record().tree(), CHANGES: changes}, _record(), 3, allowed=False)
