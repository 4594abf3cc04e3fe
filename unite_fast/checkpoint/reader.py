"""Reading a checkpoint: finding the newest intact one of a run, and loading whole tensors in one process.

This needs no DCP; manager.py loads into sharded tensors. Only safetensors and JSON are read, so untrusted files execute
nothing. The manifest says which files are read.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import prod
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unite_fast.checkpoint import folders
from unite_fast.checkpoint import format as files
from unite_fast.checkpoint.format import DamagedCheckpoint, Manifest, Shard
from unite_fast.config import Config
from unite_fast.distributed.process_group import ALONE, Ranks
from unite_fast.errors import UserError, reason_of
from unite_fast.utils.parse_json import check_kind, parse_json

SHARDING_INFO, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Keys in a shard's header: DCP stores the offsets of each tensor's shard there."""
TRIES = 4
"""Of reading the newest checkpoint of a run that saves and deletes checkpoints meanwhile."""


@dataclass
class Checkpoint:
    path: Path
    config: Config
    step: int
    progress: dict
    """State of the trainer besides tensors: loader, averages, counters."""
    shards: list[Shard]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """A part of a tensor, in one shard."""

    shard: Path
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    """As safetensors calls it."""

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(start + n for start, n in zip(self.offsets, self.shape, strict=True))


@dataclass
class _Place:
    """An entry of `SHARDING_INFO`."""

    saved_offsets: list[Annotated[int, Field(ge=0, lt=2**48)]]


def load_checkpoint(path: str | Path, prefixes: tuple[str, ...] = ("",)) -> Checkpoint:
    """Load a checkpoint in this process, with whole tensors.

    Args:
        path: a checkpoint, or a run folder (its newest intact checkpoint).
        prefixes: load only tensors whose name starts with one of these.

    Raises:
        UserError: no such checkpoint, or it is damaged.
    """
    path = Path(path)
    for attempt in range(TRIES):
        before = folders.candidates(path)
        try:
            checkpoint = find_intact(path, ALONE)
            shards = [checkpoint.path / shard.name for shard in checkpoint.shards]
            checkpoint.tensors = read_tensors(checkpoint.path, shards, prefixes)
            return checkpoint
        except UserError:
            if attempt == TRIES - 1 or folders.candidates(path) == before:
                raise
    raise AssertionError("the last attempt returns or raises")


def read_tensors(path: Path, shards: list[Path], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Assemble tensors from their parts, which may be in different files.

    Raises:
        UserError: see `list_parts`.
    """
    tensors: dict[str, Tensor] = {}
    parts = {name: parts for name, parts in list_parts(path, shards).items() if name.startswith(prefixes)}
    by_shard: dict[Path, list[tuple[str, Part]]] = defaultdict(list)
    for name, pieces in parts.items():
        for part in pieces:
            by_shard[part.shard].append((name, part))
    try:
        for shard, wanted in by_shard.items():
            with safe_open(shard, framework="pt") as file:
                for name, part in wanted:
                    _place(tensors, name, parts[name], part, file.get_tensor(name))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the checkpoint {path} cannot be loaded: {reason_of(error)}") from error
    return {name: tensors[name] for name in sorted(tensors)}


def _place(tensors: dict[str, Tensor], name: str, parts: list[Part], part: Part, values: Tensor) -> None:
    """Copy a part to its place in the whole tensor, which is made if it is missing."""
    if len(parts) == 1:
        tensors[name] = values
        return
    if name not in tensors:
        tensors[name] = torch.empty(_whole_shape(parts), dtype=values.dtype)
    tensors[name][tuple(map(slice, part.offsets, part.ends))] = values


def list_parts(path: Path, shards: list[Path]) -> dict[str, list[Part]]:
    """The parts of each tensor of a checkpoint, from the headers of its shards. They make up whole tensors: each
    element is in one part.

    Raises:
        UserError: a file cannot be read; parts of a tensor are missing, overlap or have different types.
    """
    parts: dict[str, list[Part]] = defaultdict(list)
    try:
        for shard in shards:
            with safe_open(shard, framework="pt") as file:
                header = (file.metadata() or {}).get(SHARDING_INFO, "{}")
                places = check_kind(dict[str, _Place], parse_json(header))
                for name in file.keys():  # noqa: SIM118
                    stored = file.get_slice(name)
                    shape = tuple(stored.get_shape())
                    if places and name not in places:
                        raise ValueError(f"the header of {shard.name} does not say where {name} goes")
                    offsets = tuple(places[name].saved_offsets) if places else (0,) * len(shape)
                    if len(offsets) != len(shape):
                        raise ValueError(f"{name} has {len(shape)} dimensions and {len(offsets)} offsets")
                    parts[name].append(Part(shard, offsets, shape, str(stored.get_dtype())))
        for name, pieces in parts.items():
            _check_whole(name, pieces)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the checkpoint {path} cannot be loaded: {reason_of(error)}") from error
    return dict(parts)


def _check_whole(name: str, parts: list[Part]) -> None:
    """
    Raises:
        ValueError: the parts are not one whole tensor.
    """
    if len({(len(part.shape), part.dtype) for part in parts}) > 1:
        raise ValueError(f"parts of {name} have different types")
    if sum(prod(part.shape) for part in parts) != prod(_whole_shape(parts)):
        raise ValueError(f"parts of {name} are missing, or stand twice")
    # Their sizes add up, so all is there unless two overlap.
    filled = sorted((part for part in parts if prod(part.shape)), key=lambda part: part.offsets)
    dims = range(len(parts[0].shape))
    divided = [dim for dim in dims if len({(part.offsets[dim], part.ends[dim]) for part in filled}) > 1]
    # Along one dimension, as FSDP divides tensors, only neighbours can overlap.
    pairs = pairwise(filled) if len(divided) == 1 else combinations(filled, 2)
    for a, b in pairs:
        if all(max(a.offsets[dim], b.offsets[dim]) < min(a.ends[dim], b.ends[dim]) for dim in dims):
            raise ValueError(f"parts of {name} overlap")


def _whole_shape(parts: list[Part]) -> list[int]:
    return [max(ends) for ends in zip(*(part.ends for part in parts), strict=True)]


def find_intact(path: Path, ranks: Ranks) -> Checkpoint:
    """The checkpoint `path`, or the newest intact one of the run `path`, without tensors. All its files are checked.
    The logger "unite_fast.checkpoint" warns of each damaged checkpoint that was skipped.

    Raises:
        UserError: no intact checkpoint. If `path` is a damaged checkpoint, the message suggests an intact one.
    """
    checkpoints = ranks.run_on_first(lambda: folders.candidates(path))
    damage: list[str] = []
    for candidate in checkpoints:
        try:
            manifest = _check(candidate, ranks)
        except DamagedCheckpoint as error:
            damage.append(str(error))
            continue
        for line in damage if ranks.main else ():
            files.log.warning("%s; using %s instead", line, candidate)
        return Checkpoint(candidate, manifest.config, manifest.step, manifest.progress, manifest.shards, {})
    if checkpoints != [path]:
        raise DamagedCheckpoint(f"{path} contains no intact checkpoint: {'; '.join(damage)}")
    other = ranks.run_on_first(lambda: folders.find_other(path))
    raise DamagedCheckpoint(damage[0] + (f"; another one is {other}" if other else ""))


def _check(path: Path, ranks: Ranks) -> Manifest:
    """Check every file; each rank computes the checksums of its share."""
    manifest = ranks.run_on_first(lambda: files.read_manifest(path))
    ranks.run_on_first(lambda: files.check_sizes(path, manifest.shards))
    ranks.run_on_all(lambda: files.check_checksums(path, manifest.shards[ranks.rank :: ranks.world]))
    return manifest
