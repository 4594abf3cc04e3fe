"""Reading a checkpoint: the newest undamaged one of a run, and whole tensors from its shards.

Only safetensors and JSON are read, so nothing of a stranger's file is executed. `manager.py` loads a checkpoint into
sharded tensors with DCP; here one process reads whole tensors, without DCP.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unite_fast.checkpoint import format as files
from unite_fast.checkpoint.format import DamagedCheckpoint, Manifest
from unite_fast.config import Config
from unite_fast.distributed.process_group import ALONE, Ranks
from unite_fast.errors import UserError

SHARDING_INFO, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Keys in the header of a shard under which DCP keeps where a part of a tensor begins."""


@dataclass
class Checkpoint:
    path: Path
    config: Config
    step: int
    progress: dict
    """What `Trainer` needs to go on and no tensor holds."""
    tensors: dict[str, Tensor]


def load_checkpoint(path: str | Path, prefixes: tuple[str, ...] = ("",)) -> Checkpoint:
    """Read a checkpoint into memory, in this process alone: whole tensors whose names start with one of `prefixes`.

    Args:
        path: a checkpoint, or a run folder, which means its newest undamaged one.

    Raises:
        UserError: no such checkpoint, or a damaged one.
    """
    checkpoint = find_good(Path(path), ALONE)
    shards = [checkpoint.path / shard.name for shard in files.read_manifest(checkpoint.path).shards]
    checkpoint.tensors = read_tensors(checkpoint.path, shards, prefixes)
    return checkpoint


def read_tensors(path: Path, shards: list[Path], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Put tensors together from their parts, which may lie in different shards.

    Raises:
        UserError: a shard that cannot be read, or a tensor of which a part is missing.
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


def find_good(path: Path, ranks: Ranks) -> Checkpoint:
    """The checkpoint that `path` means, without tensors, after a look at all its files. Of a run, the newest undamaged
    one; each damaged one that was passed over is a warning of the logger "unite_fast.checkpoint".

    Raises:
        UserError: none there, or none undamaged. Whoever names a damaged one is told of another.
    """
    possible = ranks.run_on_first(lambda: files.candidates(path))
    damage: list[str] = []
    for candidate in possible:
        try:
            manifest = _check(candidate, ranks)
        except DamagedCheckpoint as error:
            damage.append(str(error))
            continue
        for line in damage if ranks.rank == 0 else ():
            files.log.warning("%s; using %s instead", line, candidate)
        return Checkpoint(candidate, manifest.config, manifest.step, manifest.progress, {})
    if possible != [path]:
        raise DamagedCheckpoint(f"{path} holds no checkpoint that is undamaged: {'; '.join(damage)}")
    other = ranks.run_on_first(lambda: files.other_than(path))
    raise DamagedCheckpoint(damage[0] + (f"; another one is {other}" if other else ""))


def _check(path: Path, ranks: Ranks) -> Manifest:
    """Look at every file; the ranks share the checksums."""
    manifest = ranks.run_on_first(lambda: files.read_manifest(path))
    ranks.run_on_first(lambda: files.check_sizes(path, manifest.shards))
    ranks.run_on_all(lambda: files.check_checksums(path, manifest.shards[ranks.rank :: ranks.world]))
    return manifest
