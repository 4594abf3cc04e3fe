"""Models for inference: a safetensors file with the averaged weights, or the same from a checkpoint.

Tensors have the model's parameter names. The file's header contains the settings and the step as JSON.
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

from unite_fast.checkpoint.format import flush, parse_config, partial_path, reason_of, save_safetensors
from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.config import Config
from unite_fast.errors import UserError, require
from unite_fast.model.unite import UNITE
from unite_fast.recipes import to_tree

FORMAT = "unite_fast model 1"


@dataclass
class SavedModel:
    path: Path
    """The model file or the checkpoint folder."""
    config: Config
    step: int
    """Optimizer steps; 0 for an imported model."""
    averages: dict[str, Tensor]
    """The whole state dict, with averaged parameters."""
    weights: dict[str, Tensor]
    """The whole state dict, with the parameters as trained; equal to `averages` in a model file."""


def load_model(path: str | Path) -> SavedModel:
    """Read a model.

    Args:
        path: a model file, a checkpoint, or a run folder (its newest intact checkpoint).

    Raises:
        UserError: no such file or checkpoint, or it is damaged; a tensor is missing, unknown, or has another shape than
            the settings imply.
    """
    path = Path(path)
    if path.is_file():
        config, step, tensors = _read_file(path)
        model = SavedModel(path, config, step, tensors, tensors)
    else:
        checkpoint = load_checkpoint(path, ("model.", "ema."))
        weights, averages = (
            {name.removeprefix(prefix): t for name, t in checkpoint.tensors.items() if name.startswith(prefix)}
            for prefix in ("model.", "ema.")
        )
        # Buffers have no average.
        parameters = dict(empty_network(checkpoint.config).named_parameters())
        for name in sorted(weights.keys() - averages.keys()):
            require(name not in parameters, f"the average of {name} is missing in {path}")
        model = SavedModel(checkpoint.path, checkpoint.config, checkpoint.step, weights | averages, weights)
    _check_tensors(model)
    return model


def save_model(path: Path, config: Config, step: int, tensors: dict[str, Tensor]) -> None:
    """Write a model file. An old file at `path` stays intact until the new one is complete.

    Raises:
        UserError: no space left, no permission, or `path` is a folder.
    """
    header = json.dumps({"config": to_tree(config), "step": step})
    # A temporary folder, not a file, because safetensors writes another temporary file beside its target.
    folder = partial_path(path)
    partial = folder / path.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_safetensors({name: t.detach().contiguous() for name, t in tensors.items()}, partial, {FORMAT: header})
        os.replace(partial, path)
        flush(path.parent)
    except OSError as error:
        raise UserError(f"could not write {path}: {reason_of(error)}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def export_model(checkpoint: str | Path, out: Path) -> None:
    """Write the averaged weights of a checkpoint as a model file.

    Raises:
        UserError: see `load_model` and `save_model`; or `out` does not end in .safetensors.
    """
    require(out.suffix == ".safetensors", f"{out} must end in .safetensors, the format of model files")
    model = load_model(checkpoint)
    save_model(out, model.config, model.step, model.averages)


def _read_file(path: Path) -> tuple[Config, int, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(FORMAT)
            old = any(name.startswith("optim.") for name in file.keys())  # noqa: SIM118
            kind = "a training checkpoint of an earlier version" if old else "not one written by unite-fast export"
            if header is None:
                raise UserError(f"{path} is a safetensors file, but {kind}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        content = json.loads(header)
        return parse_config(content["config"], path), int(content["step"]), tensors
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a model file, or it is incomplete: {reason_of(error)}") from error


def _check_tensors(model: SavedModel) -> None:
    expected = empty_network(model.config).state_dict()
    mismatch = f"the weights in {model.path} do not match its settings"
    for state in (model.weights, model.averages):
        for name in sorted(expected.keys() ^ state.keys()):
            require(name in state, f"{mismatch}: {name} is missing")
            require(name in expected, f"{mismatch}: {name} is unknown")
        for name, tensor in state.items():
            shape, expected_shape = list(tensor.shape), list(expected[name].shape)
            require(shape == expected_shape, f"{mismatch}: {name} is {shape}, not {expected_shape}")


def empty_network(config: Config) -> UNITE:
    """A model on the meta device: names and shapes only."""
    with torch.device("meta"):
        return UNITE(config.model)


def describe(checkpoint: Path) -> str:
    """Step, parameter counts and settings of a checkpoint or model file, as text."""
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
