"""Recipes: settings read from YAML and dotted overrides, and written back.

A recipe names only what differs from the defaults in `config.py`. Unknown keys, wrong types and values that make no
sense are `UserError`s that name the dotted key. The resolved settings are saved with every run.
"""

import contextlib
import dataclasses
import difflib
import math
import typing
from importlib import resources
from pathlib import Path

import yaml

from unite_fast.config import PRESETS, Config
from unite_fast.errors import UserError, require

TUNABLE = (
    "kernels",
    "attention",
    "train.compile",
    "train.micro_batch",
    "train.threads",
    "parallel.reshard_after_forward",
)
"""Settings that `unite-fast tune` chooses. They decide how a step is computed, and what it computes up to rounding
alone."""


class _Loader(yaml.SafeLoader):
    """YAML without YAML 1.1's numbers to the base 60: 10:13 is text, a range of steps, and not 613."""

    def resolve(self, kind, value, implicit):
        if kind is yaml.ScalarNode and ":" in value:
            implicit = (False, implicit[1])
        return super().resolve(kind, value, implicit)


def load_config(recipe: str | None = None, overrides: tuple[str, ...] = (), tuned: str = "") -> Config:
    """The settings of a recipe, over them those of a tuned file, over both the `key=value` overrides.

    Args:
        recipe: a YAML file, or the name of a recipe that ships with the package; None is `digits`.
        overrides: for example `("train.steps=100", "model.encoder.preset=L")`.
        tuned: a file that `unite-fast tune` wrote; empty: none.

    Raises:
        UserError: no such recipe, not YAML, an unknown key, a wrong type or an impossible value.
    """
    tree = read_recipe(recipe or "digits")
    for key, value in read_tuned(tuned).items() if tuned else ():
        _assign(tree, key.split("."), value)
    for override in overrides:
        key, equals, text = override.partition("=")
        require(bool(equals) and bool(key), f"{override!r} is not an override; write key=value, e.g. train.steps=100")
        try:
            value = yaml.load(text, _Loader) if text else ""
        except yaml.YAMLError as error:
            raise UserError(f"{key}: {text!r} is not a value that YAML can read") from error
        _assign(tree, key.split("."), value)
    return from_tree(Config, tree)


def read_recipe(recipe: str) -> dict:
    path = Path(recipe)
    if not path.suffix and not path.is_file():
        path = Path(str(resources.files("unite_fast") / "configs" / f"{recipe}.yaml"))
    require(path.is_file(), f"there is no recipe {recipe}; recipes here: {', '.join(shipped_recipes())}")
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    require(isinstance(tree, dict), f"{path} must be a mapping of settings")
    return tree


def read_tuned(path: str) -> dict:
    """The settings of a file that `unite-fast tune` wrote, by dotted key.

    Raises:
        UserError: no such file, not YAML, or another setting than those that tuning chooses.
    """
    require(Path(path).is_file(), f"there is no tuned file {path}; unite-fast tune RECIPE --out {path} writes one")
    try:
        tree = yaml.load(Path(path).read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    require(isinstance(tree, dict), f"{path} must be a mapping of settings")
    found = {}
    for key, value in tree.items():
        found |= {f"{key}.{inner}": part for inner, part in value.items()} if isinstance(value, dict) else {key: value}
    for key in found:
        require(key in TUNABLE, f"{path} sets {key}; a tuned file may hold only {', '.join(TUNABLE)}")
    return found


def shipped_recipes() -> list[str]:
    folder = resources.files("unite_fast") / "configs"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _assign(tree: dict, keys: list[str], value) -> None:
    for depth, key in enumerate(keys[:-1]):
        tree = tree.setdefault(key, {})
        require(isinstance(tree, dict), f"{'.'.join(keys[: depth + 1])} is a value, not a group of settings")
    if keys[-1] == "preset":
        for size in ("width", "depth", "heads", "mlp_width"):
            tree.pop(size, None)  # a preset asked for now replaces the sizes that the recipe spells out
    tree[keys[-1]] = value


def from_tree(kind: type, tree: dict, path: str = ""):
    """A dataclass from nested dictionaries, checked; `path` is the dotted name in messages."""
    require(isinstance(tree, dict), f"{path or 'the recipe'} must be a mapping of settings, got {tree!r}")
    hints = typing.get_type_hints(kind)
    presets = PRESETS.get(kind, {})
    values = {}
    for key, value in tree.items():
        dotted = f"{path}.{key}" if path else str(key)
        if key == "preset" and presets:
            known = isinstance(value, str) and value in presets
            require(known, f"{dotted} is {value!r}; it must be one of {', '.join(presets)}")
            values = {**presets[value], **values}
        elif key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(hints)}"
            raise UserError(f"unknown setting {dotted}{hint}")
        elif dataclasses.is_dataclass(hints[key]):
            values[key] = from_tree(hints[key], {} if value is None else value, dotted)
        else:
            values[key] = _convert(hints[key], value, dotted)
    return kind(**values)


def _convert(hint, value, dotted: str):
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if isinstance(value, str):
            value = value.split(",")
        ok = isinstance(value, (list, tuple)) and len(value) == len(kinds)
        require(ok, f"{dotted} must be {len(kinds)} values, got {value!r}")
        return tuple(_convert(kind, part, dotted) for kind, part in zip(kinds, value, strict=True))
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML 1.1 reads 1e-4 as text
    if hint is float and isinstance(value, float):
        require(math.isfinite(value), f"{dotted} must be finite, got {value}")
    if hint is str and value is None:
        return ""
    if type(value) is hint:
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise UserError(f"{dotted} must be {words[hint]}, got {value!r}")


def to_tree(config) -> dict:
    """The nested dictionaries of a config, which `from_tree` reads back."""
    tree = dataclasses.asdict(config)
    return _listed(tree)


def _listed(value):
    """Tuples as lists, which YAML and JSON have."""
    if isinstance(value, dict):
        return {key: _listed(part) for key, part in value.items()}
    return list(value) if isinstance(value, tuple) else value
