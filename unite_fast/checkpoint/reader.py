"""Reading a checkpoint: finding the newest intact one of a run, and loading whole tensors in one process.

This needs no DCP; manager.py loads into sharded tensors. Only safetensors and JSON are read, so untrusted files execute
nothing.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unite_fast.checkpoint import format as files
from unite_fast.checkpoint.format import DamagedCheckpoint, Manifest, Shard
from unite_fast.config import Config
from unite_fast.distributed.process_group import ALONE, Ranks
from unite_fast.errors import UserError

SHARDING_INFO, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Keys in a shard's header: DCP stores the offsets of each tensor's shard there."""


@dataclass
class Checkpoint:
    path: Path
    config: Config
    step: int
    progress: dict
    """State of the trainer besides tensors: loader, averages, counters."""
    shards: list[Shard]
    tensors: dict[str, Tensor]


def load_checkpoint(path: str | Path, prefixes: tuple[str, ...] = ("",)) -> Checkpoint:
    """Load a checkpoint in this process, with whole tensors.

    Args:
        path: a checkpoint, or a run folder (its newest intact checkpoint).
        prefixes: load only tensors whose name starts with one of these.

    Raises:
        UserError: no such checkpoint, or it is damaged.
    """
    checkpoint = find_intact(Path(path), ALONE)
    shards = [checkpoint.path / shard.name for shard in checkpoint.shards]
    checkpoint.tensors = read_tensors(checkpoint.path, shards, prefixes)
    return checkpoint


def read_tensors(path: Path, shards: list[Path], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Assemble tensors from their parts, which may be in different files.

    Raises:
        UserError: a file cannot be read, or part of a tensor is missing.
    """
    parts: dict[str, list[tuple[list[int], Tensor]]] = defaultdict(list)
    try:
        for shard in shards:
            with safe_open(shard, framework="pt") as file:
                info = json.loads((file.metadata() or {}).get(SHARDING_INFO, "{}"))
                for name in file.keys():  # noqa: SIM118
                    if name.startswith(prefixes):
                        tensor = file.get_tensor(name)
                        parts[name].append((info.get(name, {}).get(OFFSETS, [0] * tensor.dim()), tensor))
        return {name: _join(name, parts[name]) for name in sorted(parts)}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the checkpoint {path} cannot be loaded: {files.reason_of(error)}") from error


def _join(name: str, parts: list[tuple[list[int], Tensor]]) -> Tensor:
    ends = ([start + n for start, n in zip(offsets, part.shape, strict=True)] for offsets, part in parts)
    shape = [max(sizes) for sizes in zip(*ends, strict=True)]
    if sum(part.numel() for _, part in parts) != torch.Size(shape).numel():
        raise ValueError(f"parts of {name} are missing")
    if len(parts) == 1:
        return parts[0][1]
    whole = torch.empty(shape, dtype=parts[0][1].dtype)
    for offsets, part in parts:
        whole[tuple(slice(start, start + n) for start, n in zip(offsets, part.shape, strict=True))] = part
    return whole


def find_intact(path: Path, ranks: Ranks) -> Checkpoint:
    """The checkpoint `path`, or the newest intact one of the run `path`, without tensors. All its files are checked.
    The logger "unite_fast.checkpoint" warns of each damaged checkpoint that was skipped.

    Raises:
        UserError: no intact checkpoint. If `path` is a damaged checkpoint, the message suggests an intact one.
    """
    checkpoints = ranks.run_on_first(lambda: files.candidates(path))
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
    other = ranks.run_on_first(lambda: files.find_other(path))
    raise DamagedCheckpoint(damage[0] + (f"; another one is {other}" if other else ""))


def _check(path: Path, ranks: Ranks) -> Manifest:
    """Check every file; each rank computes the checksums of its share."""
    manifest = ranks.run_on_first(lambda: files.read_manifest(path))
    ranks.run_on_first(lambda: files.check_sizes(path, manifest.shards))
    ranks.run_on_all(lambda: files.check_checksums(path, manifest.shards[ranks.rank :: ranks.world]))
    return manifest
