"""Models for use: one safetensors file with the averaged weights, or the same out of a checkpoint.

The file's tensors have the network's names; its header holds, as JSON, the settings and the step.
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unite_fast.checkpoint.format import flush, parse_config, partial_of, reason_of, save_safetensors
from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.config import Config
from unite_fast.errors import UserError, require
from unite_fast.model.unite import UNITE
from unite_fast.recipes import to_tree

FORMAT = "unite_fast model 1"


@dataclass
class SavedModel:
    path: Path
    """The file, or the folder of the checkpoint."""
    config: Config
    step: int
    """Optimizer steps; 0 of a model that was imported."""
    averages: dict[str, Tensor]
    """Every tensor of the network, the parameters averaged."""
    weights: dict[str, Tensor]
    """The same, the parameters as they were trained; the averages once more where no others were kept."""


def load_model(path: str | Path) -> SavedModel:
    """Read a model.

    Args:
        path: a model file; a checkpoint; or a run's folder, which means its newest undamaged checkpoint.

    Raises:
        UserError: no such file or checkpoint, or a damaged one; names a tensor that is missing, foreign or of another
            shape than the settings ask for.
    """
    path = Path(path)
    if path.is_file():
        config, step, tensors = _read_file(path)
        model = SavedModel(path, config, step, tensors, tensors)
    else:
        found = load_checkpoint(path, ("model.", "ema."))
        weights, averages = (
            {name.removeprefix(kind): t for name, t in found.tensors.items() if name.startswith(kind)}
            for kind in ("model.", "ema.")
        )
        trained = dict(empty_network(found.config).named_parameters())
        for name in sorted(weights.keys() - averages.keys()):
            require(name not in trained, f"{path} lacks the average of {name}")
        model = SavedModel(found.path, found.config, found.step, weights | averages, weights)
    _check_tensors(model)
    return model


def save_model(path: Path, config: Config, step: int, tensors: dict[str, Tensor]) -> None:
    """Write a model file. Whatever stood at `path` before stays whole until the new file is complete.

    Raises:
        UserError: no space left, no permission to write, or a folder in its place.
    """
    header = json.dumps({"config": to_tree(config), "step": step})
    # A folder, because safetensors itself writes a file of another name first.
    aside = partial_of(path)
    partial = aside / path.name
    try:
        aside.mkdir(parents=True, exist_ok=True)
        save_safetensors({name: t.detach().contiguous() for name, t in tensors.items()}, partial, {FORMAT: header})
        os.replace(partial, path)
        flush(path.parent)
    except OSError as error:
        raise UserError(f"could not write {path}: {reason_of(error)}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def export_model(checkpoint: str | Path, out: Path) -> None:
    """Write the averaged weights of a checkpoint as a model file.

    Raises:
        UserError: see `load_model` and `save_model`; or another ending than .safetensors.
    """
    require(out.suffix == ".safetensors", f"{out} must end in .safetensors, which is what is written")
    model = load_model(checkpoint)
    save_model(out, model.config, model.step, model.averages)


def _read_file(path: Path) -> tuple[Config, int, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(FORMAT)
            old = any(name.startswith("optim.") for name in file.keys())  # noqa: SIM118
            what = "a training checkpoint of an earlier version" if old else "no model that unite-fast export wrote"
            require(header is not None, f"{path} is a safetensors file but {what}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        content = json.loads(header)
        return parse_config(content["config"], path), int(content["step"]), tensors
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a readable model, or is incomplete: {reason_of(error)}") from error


def _check_tensors(model: SavedModel) -> None:
    expected = empty_network(model.config).state_dict()
    start = f"the weights in {model.path} do not fit its settings"
    for held in (model.weights, model.averages):
        for name in sorted(expected.keys() ^ held.keys()):
            require(name in held, f"{start}: {name} is missing")
            require(name in expected, f"{start}: {name} has no place in the model")
        for name, tensor in held.items():
            there, here = tensor.shape, expected[name].shape
            require(there == here, f"{start}: {name} is {list(there)}, not {list(here)}")


def empty_network(config: Config) -> UNITE:
    """Names and shapes without memory."""
    with torch.device("meta"):
        return UNITE(config.model)


def describe(checkpoint: Path) -> str:
    """Step, parameters and settings of a checkpoint or model file, for a person to read."""
    saved = load_model(checkpoint)
    counts = Counter()
    for name, parameter in empty_network(saved.config).named_parameters():
        counts[name.split(".")[0]] += parameter.numel()
    path = saved.path.resolve()
    files = path.iterdir() if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files) / 2**20
    lines = [
        f"{path.name}: {saved.config.name}, {saved.step} optimizer steps, {size:.1f} MiB",
        f"parameters: {sum(counts.values()):,} (encoder {counts['encoder']:,}, decoder {counts['decoder']:,})",
        yaml.safe_dump(to_tree(saved.config), sort_keys=False).rstrip(),
    ]
    return "\n".join(lines)
