"""Recipes: read settings from YAML files and dotted overrides.

A recipe lists only the settings that differ from the defaults in `config.py`. Unknown keys, wrong types and impossible
values raise a `UserError` that names the dotted key. Every run saves its resolved settings.
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
    "train.cuda_graph",
    "train.micro_batch",
    "train.threads",
    "parallel.reshard_after_forward",
)
"""Settings that `unite-fast tune` chooses. They change how a step is computed, and its results only by rounding."""


class _Loader(yaml.SafeLoader):
    """YAML without the base-60 numbers of YAML 1.1: 10:13, a range of steps, is text and not 613."""

    def resolve(self, kind, value, implicit):
        if kind is yaml.ScalarNode and ":" in value:
            implicit = (False, implicit[1])
        return super().resolve(kind, value, implicit)


def load_config(recipe: str | None = None, overrides: tuple[str, ...] = (), tuned: str = "") -> Config:
    """Resolve the settings of a run: `key=value` overrides win over the tuned file, which wins over the recipe.

    Args:
        recipe: a YAML file, or the name of a recipe in the package; None means `digits`.
        overrides: for example `("train.steps=100", "model.encoder.preset=L")`.
        tuned: a file that `unite-fast tune` wrote, or empty.

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
    """The settings of a recipe as nested dictionaries, unchecked.

    Raises:
        UserError: no such recipe, or not YAML.
    """
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
    """The settings in a file that `unite-fast tune` wrote, by dotted key.

    Raises:
        UserError: no such file, not YAML, or a setting that is not in `TUNABLE`.
    """
    require(Path(path).is_file(), f"there is no tuned file {path}; unite-fast tune RECIPE --out {path} writes one")
    try:
        tree = yaml.load(Path(path).read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    require(isinstance(tree, dict), f"{path} must be a mapping of settings")
    settings = {}
    for key, value in tree.items():
        settings |= {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    for key in settings:
        require(key in TUNABLE, f"{path} sets {key}; a tuned file may hold only {', '.join(TUNABLE)}")
    return settings


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package, sorted."""
    folder = resources.files("unite_fast") / "configs"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _assign(tree: dict, keys: list[str], value) -> None:
    """Set tree[keys[0]][keys[1]]... = value."""
    for depth, key in enumerate(keys[:-1]):
        tree = tree.setdefault(key, {})
        require(isinstance(tree, dict), f"{'.'.join(keys[: depth + 1])} is a value, not a group of settings")
    if keys[-1] == "preset":
        for size in ("width", "depth", "heads", "mlp_width"):
            tree.pop(size, None)  # an override of the preset wins over the sizes in the recipe
    tree[keys[-1]] = value


def from_tree(kind: type, tree: dict, path: str = ""):
    """Make a dataclass from nested dictionaries, and check it.

    Args:
        kind: the dataclass.
        tree: the settings that differ from its defaults.
        path: its dotted name, for messages.

    Raises:
        UserError: an unknown key, a wrong type or an impossible value.
    """
    require(isinstance(tree, dict), f"{path or 'the recipe'} must be a mapping of settings, got {tree!r}")
    hints = typing.get_type_hints(kind)
    presets = PRESETS.get(kind, {})
    values = {}
    for key, value in tree.items():
        dotted = f"{path}.{key}" if path else str(key)
        if key == "preset" and presets:
            valid = isinstance(value, str) and value in presets
            require(valid, f"{dotted} is {value!r}; it must be one of {', '.join(presets)}")
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
    """A config as nested dictionaries, the inverse of `from_tree`."""
    return {key: _tuples_to_lists(value) for key, value in dataclasses.asdict(config).items()}


def _tuples_to_lists(value):
    """YAML and JSON have no tuples."""
    if isinstance(value, dict):
        return {key: _tuples_to_lists(part) for key, part in value.items()}
    return list(value) if isinstance(value, tuple) else value
