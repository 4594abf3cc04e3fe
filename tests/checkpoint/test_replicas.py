"""A bit that differs between replicas is found before the checkpoint is written, and its rank named."""

import math
import os
import re

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from unite_fast.checkpoint import replicas
from unite_fast.checkpoint.manager import Checkpoints
from unite_fast.checkpoint.replicas import ReplicasDiffer, check_replicas, fingerprints
from unite_fast.config import Config
from unite_fast.distributed.dtensor import local
from unite_fast.distributed.process_group import Ranks

PAYLOAD = 0x7FC00001
"""A NaN, but not torch's."""


def as_float(bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


def flip(tensor: Tensor, index: int, bit: int) -> None:
    bits = tensor.view(replicas.INTEGERS[tensor.element_size()]).view(-1)
    bits[index] ^= torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(bits.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_any_bit_changes_the_fingerprint(dtype, monkeypatch):
    monkeypatch.setitem(replicas.CHUNK, "cpu", 8)
    whole = torch.arange(27).to(dtype).view(3, 9)
    before = fingerprints({"a": whole})["a"]
    bits = 8 * whole.element_size() if dtype != torch.bool else 1
    for index in (0, 7, 8, 26):
        for bit in range(bits):
            changed = whole.clone()
            flip(changed, index, bit)
            assert fingerprints({"a": changed})["a"] != before, (index, bit)


@pytest.mark.parametrize(("a", "b"), [(0.0, -0.0), (as_float(PAYLOAD), math.nan), (1.0, -1.0), (math.inf, -math.inf)])
def test_values_that_compare_alike_differ_in_bits(a, b):
    one, other = (fingerprints({"a": torch.tensor([1.0, value])}) for value in (a, b))
    assert one != other


def test_the_order_of_values_counts(monkeypatch):
    values = torch.randn(100)
    swapped = values.clone()
    swapped[[3, 90]] = values[[90, 3]]
    monkeypatch.setitem(replicas.CHUNK, "cpu", 16)
    in_chunks = fingerprints({"a": values, "b": swapped})
    assert in_chunks["a"][0] == in_chunks["b"][0] and in_chunks["a"][1] != in_chunks["b"][1]
    monkeypatch.undo()
    assert fingerprints({"a": values, "b": swapped}) == in_chunks


def test_a_transposed_and_an_empty_tensor_have_one():
    values = torch.randn(5, 3)
    assert fingerprints({"a": values.T}) == fingerprints({"a": values.T.contiguous()})
    assert fingerprints({"a": torch.zeros(0, 3)}) == {"a": (0, 0)}
    assert fingerprints({}) == {}


def state(mesh_shape) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard"))
    whole = {"even": torch.arange(24.0).view(8, 3), "uneven": torch.arange(5.0), "few": torch.ones(1)}
    sharded = {name: distribute_tensor(value, mesh, [Replicate(), Shard(0)]) for name, value in whole.items()}
    return sharded | {"step": torch.tensor(7.0), "table": torch.arange(6)}


def find(meshes, damages) -> list[str]:
    """Check once per damage: {rank: (tensor, element, bit)}; returns the messages, first those without damage."""
    torch.distributed.init_process_group("gloo")
    mine = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    messages = []
    for mesh_shape, damage in ((meshes[0], {}), (meshes[-1], {}), *zip(meshes, damages, strict=True)):
        tensors = state(mesh_shape)
        if mine.rank in damage:
            name, element, bit = damage[mine.rank]
            flip(local(tensors[name]), element, bit)
        try:
            check_replicas(tensors, mine, 40)
            messages.append("")
        except ReplicasDiffer as error:
            assert error.status == 75
            messages.append(str(error))
    return messages


def check(ranks, world, cases, mentions) -> None:
    """Each case: the mesh, the damage, and what the message has; nothing if there is none. All ranks raise the same."""
    meshes, damages, _ = zip(*cases, strict=True)
    first, *others = ranks(world, find, meshes, damages)
    assert all(messages == first for messages in others)
    assert first[:2] == ["", ""], "equal replicas"
    for message, (_, damage, expected) in zip(first[2:], cases, strict=True):
        if expected:
            assert re.search(mentions("step 40", *expected), message), (damage, message)
        else:
            assert message == "", damage


def test_one_of_three_is_named(ranks, mentions):
    ddp = (3, 1)
    cases = [
        (ddp, {2: ("even", 5, 0)}, ("rank 2", "even")),
        (ddp, {0: ("uneven", 0, 31)}, ("rank 0", "uneven")),  # 0.0 and -0.0
        (ddp, {1: ("step", 0, 3)}, ("rank 1", "step")),
        (ddp, {1: ("table", 5, 40)}, ("rank 1", "table")),
        (ddp, {0: ("even", 1, 1), 1: ("even", 1, 2)}, ("even", "ranks 0 to 2")),  # all three differ
        (ddp, {0: ("even", 1, 1), 1: ("even", 1, 1)}, ("rank 2", "even")),  # two alike outvote the third
    ]
    check(ranks, 3, cases, mentions)


def test_of_two_replicas_both_are_named_and_fsdp_has_none(ranks, mentions):
    cases = [
        ((2, 1), {1: ("even", 5, 0)}, ("even", "ranks 0, 1")),
        ((1, 2), {1: ("even", 5, 0)}, ()),
        ((1, 2), {1: ("step", 0, 0)}, ("step", "ranks 0, 1")),  # whole on both
    ]
    check(ranks, 2, cases, mentions)


def test_hsdp_compares_across_replicas(ranks, mentions):
    """Ranks 0 and 2 hold one shard, 1 and 3 the other."""
    hsdp = (2, 2)
    cases = [
        (hsdp, {3: ("even", 5, 30)}, ("even", "ranks 1, 3")),
        (hsdp, {0: ("few", 0, 4)}, ("few", "ranks 0, 2")),
        (hsdp, {1: ("even", 2, 0), 3: ("even", 2, 0)}, ()),  # alike
        (hsdp, {3: ("step", 0, 0)}, ("step", "rank 3")),  # whole on all four
    ]
    check(ranks, 4, cases, mentions)


def save_damaged(folder) -> str:
    torch.distributed.init_process_group("gloo")
    checkpoints, tensors = Checkpoints(folder, 0), state((2, 1))
    checkpoints.save(10, Config(), {}, tensors)
    if torch.distributed.get_rank() == 1:
        local(tensors["even"])[0, 0] += 1
    try:
        checkpoints.save(20, Config(), {}, tensors)
    except ReplicasDiffer as error:
        return str(error)
    finally:
        checkpoints.close()
    return ""


def test_a_damaged_state_is_not_saved(ranks, folder):
    assert all("step 20" in message for message in ranks(2, save_damaged, folder))
    assert sorted(os.listdir(folder)) == ["latest", "step_00000010"]
