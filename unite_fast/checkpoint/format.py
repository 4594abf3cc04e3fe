"""The files of a checkpoint, and their checks. For one process; manager.py coordinates ranks.

step_00001000/                  a checkpoint; folders.py has the folder around it
    shard_00001.safetensors     tensors, or shards of tensors, written by rank 0
    checkpoint.json             manifest: settings, step, progress; name, size and checksum of each shard. Nothing else
                                in the folder is read.
"""

import errno
import json
import logging
import os
import re
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from unite_fast.config import Config
from unite_fast.errors import UserError, reason_of
from unite_fast.recipes import from_tree, to_tree
from unite_fast.utils.files import flush, open_regular, read_small
from unite_fast.utils.parse_json import check_kind, parse_json

FORMAT = "unite_fast checkpoint 2"
MANIFEST = "checkpoint.json"
PLACES = (
    "data.path",
    "perceptual.vgg_path",
    "perceptual.lpips_path",
    "train.out",
    "train.wandb",
    "evaluation.inception",
    "evaluation.reference",
)
"""Settings that name a file, a command, an address or a project. A checkpoint may come from anywhere, so none is used
before the user gives it again: `parse_config` empties them."""
CHUNK = 2**22
"""Bytes per read."""
MOST_MANIFEST_BYTES = 2**26
"""A manifest may name many unreadable images. One of this size takes seconds to parse."""
MOST_STEPS = 2**31 - 1
"""The random numbers of later steps would repeat."""
MOST_SHARDS = 2**17

log = logging.getLogger("unite_fast.checkpoint")


class DamagedCheckpoint(UserError):
    """A file of the checkpoint is missing or not what was written."""


@dataclass
class Shard:
    """A safetensors file of a checkpoint."""

    # A plain name, so that it cannot lead out of the folder.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")]
    size: Annotated[int, Field(ge=0, lt=2**63)]
    """bytes"""
    crc32: Annotated[int, Field(ge=0, lt=2**32)]


@dataclass
class _Content:
    """What a manifest has beside settings and progress, which have checks of their own."""

    step: Annotated[int, Field(ge=0, le=MOST_STEPS)]
    shards: Annotated[list[Shard], Field(min_length=1, max_length=MOST_SHARDS)]


@dataclass
class Manifest:
    """Content of checkpoint.json."""

    config: Config
    step: int
    progress: dict
    shards: list[Shard]


def read_shard(path: Path) -> Shard:
    """Size and checksum of a file on disk.

    CRC-32 is in the standard library, finds every flipped byte, and runs at 3.7 GB/s on one core, faster than a disk
    (SHA-256: 1.6, BLAKE2b: 0.8). It detects accidents, not forgery.
    """
    size = crc = 0
    with open_regular(path, buffering=0) as file:
        while chunk := file.read(CHUNK):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return Shard(path.name, size, crc)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    content = {
        "config": to_tree(manifest.config),
        "step": manifest.step,
        "progress": manifest.progress,
        "shards": [vars(shard) for shard in manifest.shards],
    }
    path = folder / MANIFEST
    text = json.dumps({"format": FORMAT, "crc32": _crc32(content), "content": content}, indent=1)
    if len(text) > MOST_MANIFEST_BYTES:  # it would be saved and could not be read
        raise OSError(errno.EFBIG, f"{MANIFEST} has {len(text):,} bytes, and at most {MOST_MANIFEST_BYTES:,} are read")
    path.write_text(text)
    flush(path)


def read_manifest(path: Path) -> Manifest:
    """
    Raises:
        DamagedCheckpoint: the manifest is missing, truncated or changed.
        UserError: it has another version.
    """
    try:
        _check_link(path / MANIFEST)
        manifest = parse_json(read_small(path / MANIFEST, MOST_MANIFEST_BYTES))
        if manifest["format"] != FORMAT:
            raise UserError(f"{path} is a {manifest['format']!r}; this version reads {FORMAT!r}")
        content = manifest["content"]
        if manifest["crc32"] != _crc32(content):
            raise DamagedCheckpoint(f"{path} is damaged: {MANIFEST} is not what was written")
        checked = check_kind(_Content, {"step": content["step"], "shards": content["shards"]})
        names = Counter(shard.name for shard in checked.shards)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"it names {twice[0]} twice")
        if not isinstance(content["progress"], dict):
            raise ValueError("progress is not a mapping")
        return Manifest(parse_config(content["config"], path), checked.step, content["progress"], checked.shards)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path} is damaged: {MANIFEST} is missing") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(f"{path} is damaged: {MANIFEST} cannot be read: {reason_of(error)}") from error


def _check_link(file: Path) -> None:
    """
    Raises:
        OSError: a link out of the file's folder.
    """
    if file.is_symlink() and os.path.dirname(os.path.realpath(file)) != os.path.realpath(file.parent):
        raise OSError(errno.EINVAL, f"a link to {os.readlink(file)!r}, out of the checkpoint; copy the file there")


def parse_config(tree: dict, path: Path) -> Config:
    """Check settings that a file contains, and empty all `PLACES` in them; `places_of` has their values.

    Raises:
        UserError: unknown settings or values; names `path`.
    """
    try:
        config = from_tree(Config, tree)
    except UserError as error:
        raise UserError(f"the settings in {path} are from another version: {error}") from error
    named = {}
    for key in PLACES:
        group, name = key.split(".")
        if value := getattr(getattr(config, group), name):
            named[key] = value
    config = _with_values(config, dict.fromkeys(PLACES, ""))
    # Not a field: it is no setting. A copy by `replace` has none, which only makes messages poorer.
    vars(config)["_places"] = named
    return config


def places_of(config: Config) -> dict[str, str]:
    """What the file of these settings says at `PLACES`, by dotted key: to show it, and to write it again. Empty if they
    are not from a file."""
    return vars(config).get("_places", {})


def as_recorded(config: Config) -> Config:
    """The settings as their file has them, to show or write them."""
    return _with_values(config, places_of(config))


def _with_values(config: Config, values: dict[str, str]) -> Config:
    for key, value in values.items():
        group, name = key.split(".")
        config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    return config


def _crc32(content: dict) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def check_sizes(path: Path, shards: list[Shard]) -> None:
    """
    Raises:
        DamagedCheckpoint: a shard is missing or has another size.
    """
    for shard in shards:
        try:
            _check_link(path / shard.name)
            size = (path / shard.name).stat().st_size
        except OSError as error:
            raise DamagedCheckpoint(f"{path} is damaged: {shard.name}: {reason_of(error)}") from error
        if size != shard.size:
            raise DamagedCheckpoint(f"{path} is damaged: {shard.name} has {size} bytes, not {shard.size}")


def check_checksums(path: Path, shards: list[Shard]) -> None:
    """
    Raises:
        DamagedCheckpoint: a shard does not hold what was written.
    """
    for shard in shards:
        try:
            same = read_shard(path / shard.name) == shard
        except OSError as error:
            raise DamagedCheckpoint(f"{path} is damaged: {shard.name}: {reason_of(error)}") from error
        if not same:
            raise DamagedCheckpoint(f"{path} is damaged: {shard.name} does not hold what was written")


def save_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write contiguous CPU tensors to a file in a new folder, and sync it to disk.

    Raises:
        OSError: no space left, or no permission.
    """
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        # It contains the system's error as text only.
        number = re.search(r"\(os error (\d+)\)", str(error))
        raise OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error)) from error
    # safetensors creates files that only the owner may read. Take the permissions of the folder: reading the umask
    # would mean setting it, while other threads create files.
    path.chmod(path.parent.stat().st_mode & 0o666)
    flush(path)
