"""Comparing the replicas of the training state, before a checkpoint is written.

Replicas compute the same numbers from the same gradients, so they agree in every bit until hardware corrupts one, or
machines differ. Nothing else notices: losses are averaged over the ranks, and each tensor is saved by one of them.
"""

import hashlib
from collections import Counter

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from unite_fast.checkpoint.save_plan import mesh_of
from unite_fast.distributed.dtensor import local
from unite_fast.distributed.hosts import name_ranks
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import TemporaryError, shown

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes per element."""
CHUNK = {"cpu": 2**16, "cuda": 2**20}
"""Elements that are converted to int64 at a time: few enough for a CPU's cache, enough for a GPU's launches."""

Fingerprints = dict[str, tuple[int, int]]


class ReplicasDiffer(TemporaryError):
    """The training state of some ranks is damaged: restart from the last checkpoint."""


def check_replicas(tensors: dict[str, Tensor], ranks: Ranks, step: int) -> None:
    """Check that all ranks that hold the same shard hold the same bits. All ranks call this together.

    Args:
        tensors: plain tensors, equal on all ranks, or DTensors on one mesh.

    Raises:
        ReplicasDiffer: they do not; names the ranks in the minority. On every rank.
    """
    if ranks.world == 1:
        return
    replicas, shards = mesh_of(tensors, ranks.world)
    plain = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    sharded = {name: local(tensors[name]) for name in tensors.keys() - plain.keys()} if replicas > 1 else {}
    mine = (fingerprints(plain), fingerprints(sharded))
    digests = ranks.gather(tuple(map(_digest, mine)))
    of_plain, of_sharded = zip(*digests, strict=True)
    if len(set(of_plain)) == 1 and all(len(set(of_sharded[shard::shards])) == 1 for shard in range(shards)):
        return
    gathered = ranks.gather(mine)
    everyone = list(range(ranks.world))
    differences = _differences([both[0] for both in gathered], [everyone])
    differences |= _differences([both[1] for both in gathered], [everyone[shard::shards] for shard in range(shards)])
    raise ReplicasDiffer(f"step {step}: {_describe(differences)}")


def fingerprints(tensors: dict[str, Tensor]) -> Fingerprints:
    """Two numbers per tensor, from its elements' bits taken as integers b_i: sum b_i and sum (i + 1) b_i, mod 2^64.
    -0.0 and 0.0 differ, and so do NaNs with other payloads. Computed on the tensors' device."""
    if not tensors:
        return {}
    device = next(iter(tensors.values())).device
    positions = torch.arange(1, CHUNK[device.type] + 1, device=device)
    sums = torch.stack([_sums(tensor.detach(), positions) for tensor in tensors.values()]).tolist()
    return {name: (first, second) for name, (first, second) in zip(tensors, sums, strict=True)}


def _sums(tensor: Tensor, positions: Tensor) -> Tensor:
    """int64 [2]"""
    bits = tensor.view(INTEGERS[tensor.element_size()]).flatten()
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), len(positions)):
        chunk = bits[start : start + len(positions)].long()
        total = chunk.sum()
        sums += torch.stack([total, (chunk * positions[: len(chunk)]).sum() + start * total])
    return sums


def _digest(numbers: Fingerprints) -> bytes:
    return hashlib.sha256(repr(sorted(numbers.items())).encode()).digest()


def _differences(by_rank: list[Fingerprints], groups: list[list[int]]) -> dict[str, tuple[set[int], bool]]:
    """Tensors that differ within a group of replicas: the ranks in the minority, and whether there is a majority; all
    ranks of the group if there is none."""
    differences = {}
    for name in sorted(set().union(*by_rank)):
        odd, clear = set(), True
        for group in groups:
            held = {rank: by_rank[rank].get(name) for rank in group}
            (most, count), *others = Counter(held.values()).most_common()
            majority = 2 * count > len(group)
            if others:
                odd |= {rank for rank in group if held[rank] != most or not majority}
                clear = clear and majority
        if odd:
            differences[name] = odd, clear
    return differences


def _describe(differences: dict[str, tuple[set[int], bool]]) -> str:
    odd = sorted(set().union(*(ranks for ranks, _ in differences.values())))
    first = next(iter(differences))
    more = f" and {len(differences) - 1} more tensors" if len(differences) > 1 else ""
    if all(clear for _, clear in differences.values()):
        what = f"{name_ranks(odd)} and the other replicas differ in {shown(first)}{more}"
    else:
        what = f"replicas differ in {shown(first)}{more}, and no majority says which is wrong: {name_ranks(odd)}"
    return (
        f"{what}; no checkpoint was saved. A machine's memory or arithmetic is faulty, or machines differ: resume from "
        "the last checkpoint, and if it happens again on the same machine replace that"
    )
