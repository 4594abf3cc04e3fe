"""The same functions for sharded and plain tensors."""

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from unite_fast.distributed.dtensor import copy_full, full_tensor, local, shard_group


def test_a_plain_tensor_is_its_own_local_and_full_tensor():
    tensor, source = torch.zeros(4, 2), torch.arange(8.0).view(4, 2)
    assert local(tensor) is tensor and full_tensor(tensor) is tensor and shard_group(tensor) is None
    copy_full(tensor, source)
    assert torch.equal(tensor, source)


def _sharded() -> list:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    mesh = init_device_mesh("cpu", (1, 3), mesh_dim_names=("replicate", "shard"))
    source = torch.arange(10.0).view(5, 2)
    sharded = distribute_tensor(torch.zeros(5, 2), mesh, (Replicate(), Shard(0)))
    copy_full(sharded, source)
    shared_memory = local(sharded).data_ptr() == sharded.to_local().data_ptr()
    group = shard_group(sharded)
    return [
        torch.equal(local(sharded), source[2 * rank : 2 * rank + 2]) and shared_memory,
        torch.equal(full_tensor(sharded), source),
        group is not None and distributed.get_world_size(group) == 3,
        shard_group(distribute_tensor(source, mesh, (Replicate(), Replicate()))) is None,
    ]


def test_a_sharded_tensor_has_local_and_full_values(ranks):
    assert ranks(3, _sharded) == [[True] * 4] * 3
