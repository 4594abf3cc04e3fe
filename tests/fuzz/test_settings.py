"""Settings: recipes, overrides, tuned files."""

import math

import yaml
from hypothesis import strategies as st

from unite_fast.config import Config
from unite_fast.recipes import TUNABLE, from_tree, load_config, read_recipe, shipped_recipes, to_tree
from unite_fast.training.run_folder import flatten

KEYS = sorted(flatten(to_tree(Config())))


def _same(given, kept) -> bool:
    """Whether a setting is what the file says."""
    if isinstance(kept, (list, tuple)):
        given = given.split(",") if isinstance(given, str) else given
        return len(given) == len(kept) and all(map(_same, given, kept))
    if isinstance(kept, bool) or isinstance(given, bool):
        return given is kept
    if isinstance(kept, float):
        return math.isclose(float(given), kept, rel_tol=1e-15)
    return given == kept or (kept == "" and given is None)


def _check(config: Config, tree: dict) -> None:
    """Every setting that was given is kept, and the settings survive a round trip."""
    assert from_tree(Config, to_tree(config)) == config
    kept = flatten(to_tree(config))
    for key, value in flatten(tree).items():
        if key.rpartition(".")[2] != "preset" and not (key in ("model.latent_tokens",) or value in ({}, None)):
            assert _same(value, kept[key]), (key, value, kept[key])


def test_changed_recipes(fuzz, slow_inputs):
    def one(draw, folder):
        tree = draw(fuzz.changed_tree(read_recipe(draw(st.sampled_from(shipped_recipes())))))
        (folder / "recipe.yaml").write_text(yaml.safe_dump(tree), errors="replace")
        config = load_config(str(folder / "recipe.yaml"))
        _check(config, read_recipe(str(folder / "recipe.yaml")))

    fuzz("recipes, changed values", one)


def test_damaged_recipes(fuzz, slow_inputs):
    recipe = yaml.safe_dump(to_tree(load_config("imagenet256_b"))).encode()

    def one(draw, folder):
        (folder / "recipe.yaml").write_bytes(draw(fuzz.damaged(recipe)))
        _check(load_config(str(folder / "recipe.yaml")), read_recipe(str(folder / "recipe.yaml")))

    fuzz("recipes, damaged text", one)


def test_overrides(fuzz, slow_inputs):
    def one(draw, folder):
        key = draw(st.one_of(st.sampled_from(KEYS), st.text(max_size=12)))
        value = draw(st.one_of(fuzz.value().map(str), st.text(max_size=20)))
        load_config("digits", (f"{key}={value}",))

    fuzz("overrides", one)


def test_tuned_files(fuzz, slow_inputs):
    def one(draw, folder):
        tree = {draw(st.sampled_from([*TUNABLE, "data.path", "train.steps"])): draw(fuzz.value()) for _ in range(2)}
        (folder / "tuned.yaml").write_text(yaml.safe_dump(tree), errors="replace")
        kept = flatten(to_tree(load_config("digits", (), str(folder / "tuned.yaml"))))
        for key, value in tree.items():
            assert key in TUNABLE
            assert _same(value, kept[key]), (key, value)

    fuzz("tuned files", one)
