"""YAML from users and strangers."""

import time

import pytest

from unite_fast.errors import UserError
from unite_fast.read_yaml import parse_yaml, read_yaml
from unite_fast.recipes import load_config

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: &a [*a]",
        "a: &a {b: *a}",
        "[" * 100_000 + "]" * 100_000,
        "{a: " * 5_000 + "1" + "}" * 5_000,
        "- " * 20_000,
        "x" * (2**20 + 1),
        "a: 0x_",
        "a: !!timestamp 2024-13-45",
        "a: !!timestamp x",
        "a: !!bool x",
        "a: !!int x",
        "a: !!int ''",
        "a: !!float x",
        "a: !!binary é",
        "a: !!python/object/apply:os.system [touch mark]",
        "a: " + "9" * 10_000,
        "a: 1\na: 2",
        "train: {steps: 1}\nname: x\ntrain: {steps: 2}",
        "{a: 1, a: 2}",
        "? [a]\n: 1",
        "? {a: b}\n: 1",
        "a: 1\n---\na: 2",
        "a: [",
        "a:\n\t- 1",
        "\0",
    ],
    ids=range(26),
)
def test_what_is_no_set_of_values_is_one_line_at_once(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "recipe.yaml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert time.perf_counter() - start < 10
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "value"),
    [("10:13", "10:13"), ("010", "010"), ("2024-11-28", "2024-11-28"), ("2024-13-45", "2024-13-45"), ("1_000", 1000)],
)
def test_what_yaml_1_1_reads_as_other_numbers_or_dates_is_text(text, value):
    assert parse_yaml(text, "value") == value


def test_an_anchor_that_stands_for_little_is_allowed():
    assert parse_yaml("a: &a {b: 1}\nc: *a", "value") == {"a": {"b": 1}, "c": {"b": 1}}


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"a\.yaml"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.encoder.width=2147483648", "model.encoder.width"),
        ("model.decoder.depth=1000000", "model.decoder.depth"),
        ("model.num_classes=1000000000000", "model.num_classes"),
        ("model.image_size=1048576", "model.image_size"),
        ("data.workers=100000", "data.workers"),
        ("train.batch_size=1000000000000", "train.batch_size"),
        ("train.steps=1000000000000000000000", "train.steps"),
        ("sampling.steps=1000000000", "sampling.steps"),
        ("evaluation.count=1000000000000", "evaluation.count"),
        ("objective.flow_draws=1000000000", "objective.flow_draws"),
        ("train.steps=010", "train.steps"),
        ("train.steps=2024-11-28", "train.steps"),
        ("train.steps=0x_", "train.steps"),
        ("train.steps=[1,[2]]", "train.steps"),
        ("train.steps=!!timestamp 2024-13-45", "train.steps"),
        ("train.steps=1e400", "train.steps"),
        ("schedule.lr=1e400", "schedule.lr"),
        ("schedule.lr=.nan", "schedule.lr"),
        ("train=3", "train"),
        ("train.steps.x=3", "train.steps"),
        ("train=[1]", "train"),
    ],
)
def test_a_setting_out_of_its_range_names_its_key(override, key, mentions):
    with pytest.raises(UserError, match=mentions(key)) as caught:
        load_config("digits", (override,))
    assert "\n" not in str(caught.value)


def test_a_folder_may_be_called_by_a_date():
    assert load_config("digits", ("train.out=2024-11-28",)).train.out == "2024-11-28"
