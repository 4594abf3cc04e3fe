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

from unite_fast.config import (
    MOST_IMAGES,
    MOST_PER_BATCH,
    MOST_STEPS,
    MOST_THREADS,
    MOST_WORKERS,
    PRESETS,
    Config,
)
from unite_fast.errors import UserError, require, shown
from unite_fast.read_yaml import parse_yaml, read_yaml

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


LARGEST = {
    **{f"model.{key}": 2**14 for key in ("image_size", "patch_size", "latent_channels")},
    "model.latent_tokens": 2**20,
    "model.num_classes": 2**24,
    **{f"model.{part}.width": 2**16 for part in ("encoder", "decoder")},
    **{f"model.{part}.{key}": 2**12 for part in ("encoder", "decoder") for key in ("depth", "heads")},
    "model.encoder.in_context_tokens": 2**14,
    "model.decoder.mlp_width": 2**18,
    "model.decoder.embed_width": 2**16,
    "objective.flow_draws": 2**12,
    "data.workers": MOST_WORKERS,
    "train.threads": MOST_THREADS,
    "train.batch_size": 2**24,
    "train.micro_batch": 2**24,
    "evaluation.count": MOST_IMAGES,
    "evaluation.batch": MOST_PER_BATCH,
}
"""The largest values of some settings, far above every use. Beyond them, memory or time would end long before the work
does."""

LARGEST_NUMBER = MOST_STEPS
"""Of all other whole numbers."""

LARGEST_FLOAT = 1e30
"""Of all other numbers: products of larger ones do not fit into float32."""


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
        named = bool(equals) and bool(key)
        require(named, f"{shown(override)} is not an override; write key=value, e.g. train.steps=100")
        value = parse_yaml(text, f"the value of {key}, {shown(text)},") if text else ""
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
    fault = f"{path} is a folder, a pipe or a device and no recipe" if path.exists() else f"there is no recipe {recipe}"
    require(path.is_file(), f"{fault}; name a YAML file, or one of {', '.join(shipped_recipes())}")
    tree = read_yaml(path)
    require(isinstance(tree, dict), f"{path} must be a mapping of settings")
    return tree


def length_note(recipe: str | None, config: Config) -> str:
    """A line for people if the batch is not the recipe's: how many images the run then has, and how to keep them; else
    empty."""
    try:
        own = from_tree(Config, read_recipe(recipe or "digits"))
    except UserError:  # complete only with the overrides
        return ""
    before, now = (each.train.steps * each.train.batch_size for each in (own, config))
    batch = config.train.batch_size
    if batch == own.train.batch_size:
        return ""
    samples = config.model.modality
    said = f"batch {batch}, the recipe's is {own.train.batch_size}: {config.train.steps} steps are {now:,} {samples}"
    if abs(now - before) < batch:
        return f"{said}, as many as the recipe's"
    kept = own.schedule.unit and own.schedule.steps == own.train.steps
    keep = "" if kept else f" schedule.unit={own.train.batch_size} schedule.steps={own.train.steps}"
    return f"{said}, {now / before:.3g} times the recipe's {before:,}; train.steps=0{keep} keeps them"


def read_tuned(path: str) -> dict:
    """The settings in a file that `unite-fast tune` wrote, by dotted key.

    Raises:
        UserError: no such file, not YAML, or a setting that is not in `TUNABLE`.
    """
    require(Path(path).is_file(), f"there is no tuned file {path}; unite-fast tune RECIPE --out {path} writes one")
    tree = read_yaml(Path(path))
    require(isinstance(tree, dict), f"{path} must be a mapping of settings")
    settings = {}
    for key, value in tree.items():
        require(value != {}, f"{path} sets {shown(key)} to nothing; give it a value, or leave it out")
        settings |= {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    for key in settings:
        require(key in TUNABLE, f"{path} sets {shown(key)}; a tuned file may hold only {', '.join(TUNABLE)}")
    return settings


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package, sorted."""
    folder = resources.files("unite_fast") / "configs"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _assign(tree: dict, keys: list[str], value) -> None:
    """Set tree[keys[0]][keys[1]]... = value."""
    for depth, key in enumerate(keys[:-1]):
        if tree.get(key) is None:  # missing, or a group without settings
            tree[key] = {}
        tree = tree[key]
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
    require(isinstance(tree, dict), f"{path or 'the recipe'} must be a mapping of settings, got {shown(tree)}")
    hints = typing.get_type_hints(kind)
    presets = PRESETS.get(kind, {})
    values = {}
    for key, value in tree.items():
        dotted = f"{path}.{key}" if path else str(key)
        if key == "preset" and presets:
            valid = isinstance(value, str) and value in presets
            require(valid, f"{dotted} is {shown(value)}; it must be one of {', '.join(presets)}")
            values = {**presets[value], **values}
        elif key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(hints)}"
            raise UserError(f"unknown setting {shown(dotted)[1:-1]}{hint}")
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
        require(ok, f"{dotted} must be {len(kinds)} values, got {shown(value)}")
        return tuple(_convert(kind, part, dotted) for kind, part in zip(kinds, value, strict=True))
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML 1.1 reads 1e-4 as text
    if hint is float and isinstance(value, float):
        require(math.isfinite(value), f"{dotted} must be finite, got {value}")
        require(abs(value) <= LARGEST_FLOAT, f"{dotted} is {value}: it may be at most {LARGEST_FLOAT:g}")
    if hint is str and value is None:
        return ""
    if type(value) is hint:
        if isinstance(value, int) and hint is int:
            most = LARGEST.get(dotted, LARGEST_NUMBER if dotted != "seed" else 2**64)
            require(abs(value) <= most, f"{dotted} is {shown(value)}; it must be at most {most:,}")
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    quotes = "; put it in quotes" if hint is str and isinstance(value, (bool, int, float)) else ""
    raise UserError(f"{dotted} must be {words[hint]}, got {shown(value)}{quotes}")


def to_tree(config) -> dict:
    """A config as nested dictionaries, the inverse of `from_tree`."""
    return {key: _tuples_to_lists(value) for key, value in dataclasses.asdict(config).items()}


def _tuples_to_lists(value):
    """YAML and JSON have no tuples."""
    if isinstance(value, dict):
        return {key: _tuples_to_lists(part) for key, part in value.items()}
    return list(value) if isinstance(value, tuple) else value
