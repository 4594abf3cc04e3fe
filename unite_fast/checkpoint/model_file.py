"""Models for inference: a safetensors file with the averaged weights, or the same from a checkpoint.

Tensors have the model's parameter names. The file's header contains the settings, the step and a checksum as JSON. The
checksum is the SHA-256 of the whole file, with zeros in place of its own digits.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
import yaml
from pydantic import ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unite_fast.checkpoint.folders import checkpoint_files
from unite_fast.checkpoint.format import (
    CHUNK,
    MOST_STEPS,
    as_recorded,
    log,
    parse_config,
    save_safetensors,
)
from unite_fast.checkpoint.progress import check_progress, class_names
from unite_fast.checkpoint.reader import load_checkpoint
from unite_fast.config import Config, ModelConfig
from unite_fast.errors import UserError, printable, reason_of, require, shown
from unite_fast.model.unite import UNITE
from unite_fast.recipes import to_tree
from unite_fast.utils.file_lock import lock_output
from unite_fast.utils.files import atomic_write, check_not_read, open_regular, private_folder
from unite_fast.utils.parse_json import check_kind, parse_json

FORMAT = "unite_fast model 1"
NO_DIGEST = "0" * 64
MOST_HEADER_BYTES = 100_000_000
"""As in safetensors itself."""
MOST_NAME_BYTES = 2**24
"""Of all names of classes together; more are not written, so that the header stays below the limit."""


@dataclass
class _Header:
    """The JSON at `FORMAT`."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # damage to a key does not hide it

    config: dict[str, Any]
    step: Annotated[int, Field(ge=0, le=MOST_STEPS)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Earlier versions wrote none."""
    classes: list[str] | None = None
    """Names of the classes, in the order of the labels; None if they are not known."""


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
    size: int
    """Bytes of the files."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """What the user let change when the run was resumed; only a checkpoint has them."""
    class_names: list[str] = field(default_factory=list)
    """Of the training data, in the order of the labels; empty if they are not known."""


def load_model(path: str | Path) -> SavedModel:
    """Read a model.

    Args:
        path: a model file, a checkpoint, or a run folder (its newest intact checkpoint).

    Raises:
        UserError: no such file or checkpoint, or it is damaged; a tensor is missing, unknown, has another shape or type
            than the settings imply, or values that are not finite.
    """
    path = Path(path)
    if path.is_file():
        config, content, tensors = _read_file(path)
        network = empty_network(config.model, len(tensors), path)
        size, names = path.stat().st_size, content.classes or []
        model = SavedModel(path, config, content.step, tensors, tensors, size, class_names=names)
    else:
        checkpoint = load_checkpoint(path, ("model.", "ema."))
        weights, averages = (
            {name.removeprefix(prefix): t for name, t in checkpoint.tensors.items() if name.startswith(prefix)}
            for prefix in ("model.", "ema.")
        )
        network = empty_network(checkpoint.config.model, len(weights), checkpoint.path)
        # Buffers have no average.
        parameters = dict(network.named_parameters())
        for name in sorted(weights.keys() - averages.keys()):
            require(name not in parameters, f"the average of {name} is missing in {path}")
        size = sum(shard.size for shard in checkpoint.shards)
        check_progress(checkpoint.progress, checkpoint.path)
        changes = checkpoint.progress.get("changes", [])
        config, step, names = checkpoint.config, checkpoint.step, class_names(checkpoint.progress)
        model = SavedModel(checkpoint.path, config, step, weights | averages, weights, size, changes, names)
    _check_tensors(model, network.state_dict())
    return model


def save_model(path: Path, config: Config, step: int, tensors: dict[str, Tensor], classes: Sequence[str] = ()) -> None:
    """Write a model file. An old file at `path` stays intact until the new one is complete.

    Args:
        classes: their names, in the order of the labels; empty if they are not known.

    Raises:
        UserError: no space left, no permission, or `path` is a folder.
    """
    names = {"classes": list(classes)} if classes and len(json.dumps(classes)) <= MOST_NAME_BYTES else {}
    header = json.dumps({"config": to_tree(config), "step": step, "sha256": NO_DIGEST, **names})
    with lock_output(path), atomic_write(path) as partial, private_folder(partial) as folder:
        # A folder of its own, because safetensors writes another temporary file beside its target.
        file = folder / "model.safetensors"
        save_safetensors({name: t.detach().contiguous() for name, t in tensors.items()}, file, {FORMAT: header})
        _write_digest(file)
        file.chmod(partial.stat().st_mode & 0o777)
        os.replace(file, partial)


def export_model(checkpoint: str | Path, out: Path) -> None:
    """Write the averaged weights of a checkpoint as a model file.

    Raises:
        UserError: see `load_model` and `save_model`; or `out` does not end in .safetensors.
    """
    require(out.suffix == ".safetensors", f"{out} must end in .safetensors, the format of model files")
    check_model_target(out, checkpoint_files(Path(checkpoint)))
    model = load_model(checkpoint)
    save_model(out, as_recorded(model.config), model.step, model.averages, model.class_names)


def _write_digest(path: Path) -> None:
    with path.open("r+b") as file:
        digest, place = _digest_of(file, NO_DIGEST)
        file.seek(place)
        file.write(digest.encode())


def _digest_of(file: BinaryIO, written: str) -> tuple[str, int]:
    """SHA-256 of a model file, with zeros in place of the digits `written`, and where these stand.

    Raises:
        ValueError: the digits do not stand in the header once.
    """
    file.seek(0)
    length = file.read(8)
    size = int.from_bytes(length, "little")
    if size > MOST_HEADER_BYTES:
        raise ValueError(f"its header has {size:,} bytes")
    header = file.read(size)
    before = b'\\"sha256\\": \\"'  # in a JSON text inside a JSON text
    if header.count(before + written.encode()) != 1:
        raise ValueError("its checksum does not stand in its header once")
    place = header.index(before + written.encode()) + len(before)
    digest = hashlib.sha256(length + header[:place] + NO_DIGEST.encode() + header[place + len(written) :])
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest(), len(length) + place


def _check_digest(path: Path, written: str | None) -> None:
    """
    Raises:
        ValueError: the file is not what was written.
    """
    if written is None:
        log.warning("%s has no checksum, since an earlier version wrote it: damage to its weights would not show", path)
        return
    with open_regular(path) as file:
        if _digest_of(file, written)[0] != written:
            raise ValueError("its checksum is another one: it is not what was written")


def check_model_target(out: Path, source: Path) -> None:
    """Check where a model file is to be written, before the work.

    Raises:
        UserError: `out` is the source or inside it, or it is another file than a model file.
    """
    check_not_read(out, source)
    require(not out.is_dir(), f"{out} is in the way: it is a folder; choose another output")
    if out.exists() and out.stat().st_size:
        header = {}
        with suppress(SafetensorError, OSError), safe_open(out, framework="pt") as file:
            header = file.metadata() or {}
        ours = any(key.startswith(FORMAT.rstrip("0123456789")) for key in header)
        require(ours, f"{out} is in the way: it is no model file of unite_fast; move it, or choose another output")


def _read_file(path: Path) -> tuple[Config, _Header, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(FORMAT)
            old = any(name.startswith("optim.") for name in file.keys())  # noqa: SIM118
            kind = "a training checkpoint of an earlier version" if old else "not one written by unite-fast export"
            if header is None:
                raise UserError(f"{path} is a safetensors file, but {kind}")
            tree = parse_json(header)
            content = check_kind(_Header, tree)
            content.classes = tree.get("classes")  # the check shows bytes that are not text as question marks
            _check_digest(path, content.sha256)
            config = parse_config(content.config, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return config, content, tensors
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a model file, or it is incomplete: {reason_of(error)}") from error


def _check_tensors(model: SavedModel, expected: dict[str, Tensor]) -> None:
    mismatch = f"the weights in {model.path} do not match its settings"
    for state in (model.weights, model.averages):
        for name in sorted(expected.keys() ^ state.keys()):
            require(name in state, f"{mismatch}: {name} is missing")
            require(name in expected, f"{mismatch}: {name} is unknown")
        for name, tensor in state.items():
            shape, expected_shape = list(tensor.shape), list(expected[name].shape)
            require(shape == expected_shape, f"{mismatch}: {name} is {shape}, not {expected_shape}")
            dtype = expected[name].dtype
            require(tensor.dtype == dtype, f"{mismatch}: {name} is {tensor.dtype}, not {dtype}")
            require(bool(tensor.isfinite().all()), f"the weights in {model.path} are not finite: {name}")


def empty_network(config: ModelConfig, tensors: int, source: str | Path) -> UNITE:
    """A model on the meta device, names and shapes only, to compare the `tensors` tensors of the file `source` with.

    Raises:
        UserError: more blocks than tensors, and each block would take time; or sizes that no tensor can have.
    """
    blocks = config.encoder.depth + config.decoder.depth
    require(blocks <= tensors, f"{source}: a model of {blocks} blocks does not fit into {tensors} tensors")
    try:
        with torch.device("meta"):
            return UNITE(config)
    except (RuntimeError, OverflowError, ValueError, TypeError) as error:
        raise UserError(f"{source}: no model can have these sizes: {reason_of(error)}") from error


def describe(checkpoint: Path) -> str:
    """Step, parameter counts and settings of a checkpoint or model file, as text."""
    saved = load_model(checkpoint)
    counts = Counter()
    for name, parameter in empty_network(saved.config.model, len(saved.averages), saved.path).named_parameters():
        counts[name.split(".")[0]] += parameter.numel()
    file, name, size = saved.path.resolve().name, printable(saved.config.name), saved.size / 2**20
    lines = [
        f"{file}: {name}, {saved.step} optimizer steps, {size:.1f} MiB",
        f"parameters: {sum(counts.values()):,} (encoder {counts['encoder']:,}, decoder {counts['decoder']:,})",
    ]
    for change in saved.changes:
        step, key, difference = (shown(change.get(entry)) for entry in ("step", "key", "difference"))
        lines.append(f"changed after step {step}: {key}: {difference}")
    lines.append(yaml.safe_dump(to_tree(as_recorded(saved.config)), sort_keys=False).rstrip())
    return "\n".join(lines)
