"""YAML from users and strangers."""

import os
import time

import pytest
import yaml

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
        "a: 0x" + "f" * 5_000,
        "a: -0b" + "1" * 20_000,
        "{<<: {a: 1}, <<: {a: 2}}",
        "<<: 3",
        "a: [" + "1," * 120_000 + "]",
        "a: [",
        "a:\n\t- 1",
        "\0",
    ],
    ids=range(31),
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


def test_a_group_takes_over_another_ones_values_and_its_own_win():
    text = "a: &a {lr: 1, eps: 2}\nb: &b {<<: *a, lr: 3}\nc: {<<: *b, eps: 4}\nd: *b"
    assert parse_yaml(text, "value") == {
        "a": {"lr": 1, "eps": 2},
        "b": {"lr": 3, "eps": 2},
        "c": {"lr": 3, "eps": 4},
        "d": {"lr": 3, "eps": 2},
    }


def test_reading_stops_at_too_many_values(monkeypatch):
    """Composing a whole text of 256 KiB would take seconds."""
    text, seen = "a: [" + "1," * 100_000 + "]", []
    compose = yaml.SafeLoader.compose_scalar_node
    monkeypatch.setattr(yaml.SafeLoader, "compose_scalar_node", lambda *a: seen.append(0) or compose(*a))
    with pytest.raises(UserError, match="10,000"):
        parse_yaml(text, "value")
    assert len(seen) <= 10_000


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


@pytest.mark.parametrize("text", ["name: 2024", "train: {wandb: off}", "data: {path: 1.5}"])
def test_text_that_yaml_takes_for_something_else_is_to_be_quoted(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match="quotes"):
        load_config(str(tmp_path / "a.yaml"))


def test_a_group_without_settings_takes_overrides(tmp_path):
    (tmp_path / "a.yaml").write_text("train:\nmodel:\n  encoder:\n")
    overrides = ("train.steps=7", "model.encoder.depth=5")
    config = load_config(str(tmp_path / "a.yaml"), overrides)
    assert (config.train.steps, config.model.encoder.depth) == (7, 5)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_recipe_that_is_no_regular_file_is_named(kind, tmp_path, mentions):
    path = tmp_path / "a.yaml"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(UserError, match=mentions(path, kind, "digits")):
        load_config(str(path))


def test_a_folder_may_be_called_by_a_date():
    assert load_config("digits", ("train.out=2024-11-28",)).train.out == "2024-11-28"
