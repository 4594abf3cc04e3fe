"""The processes that torchrun started to work together, or the only one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unite_fast.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together, as torchrun counts them. Of one process, every method gives back its
    input."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    per_node: int = 1
    """Processes on each machine."""

    @classmethod
    def of_environment(cls) -> "Ranks":
        """By the variables that torchrun sets; alone where there are none."""
        names = {"rank": "RANK", "world": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "per_node": "LOCAL_WORLD_SIZE"}
        return cls(**{name: int(os.environ[key]) for name, key in names.items() if key in os.environ})

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        return self.world // self.per_node

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list:
        """What each process holds, rank 0 first."""
        if self.world == 1:
            return [value]
        values: list = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """What rank 0 holds."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def batches(self, count: int, batch: int) -> Iterator[range]:
        """This process's part of `count` numbered samples. The batches are the same for any number of processes, so
        every sample is computed among the same neighbours and comes out the same to the last bit."""
        starts = range(0, count, batch)
        return (range(start, min(start + batch, count)) for start in starts[self.rank :: self.world])


ALONE = Ranks()


def current_ranks() -> Ranks:
    """Of the process group that is already there, if one is."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


def own_device(kind: str, ranks: Ranks) -> tuple[torch.device, str]:
    """The device that this process works on, and the backend for its process group: on CUDA gloo too, since counts and
    small sums live on the CPU.

    Args:
        kind: cpu or cuda; of several CUDA devices, this process takes the one of its number on the machine.

    Raises:
        UserError: more processes on a machine than it has CUDA devices.
    """
    if kind != "cuda":
        return torch.device(kind), "gloo"
    devices = torch.cuda.device_count()
    # Not by the rank, so that all processes of a machine say it, rank 0 among them.
    if ranks.per_node > devices:
        raise UserError(
            f"{ranks.per_node} processes on this machine, but torch sees {devices} CUDA devices; start one for each"
        )
    torch.cuda.set_device(ranks.local_rank)
    return torch.device(kind, ranks.local_rank), "cpu:gloo,cuda:nccl"


@contextmanager
def ranks_of_torchrun(device: torch.device) -> Iterator[Ranks]:
    """Joins the processes that torchrun started, if it did, and leaves them at the end.

    Args:
        device: of kind "cpu" or "cuda"; the current CUDA device becomes this process's own.
    """
    ranks = Ranks.of_environment()
    if ranks.world == 1 or dist.is_initialized():
        yield current_ranks()
        return
    # Processes meet seldom, with hours of work between; one that dies is torchrun's to notice.
    dist.init_process_group(own_device(device.type, ranks)[1], timeout=timedelta(hours=12))
    yield current_ranks()
    # Not after an error: it could wait for processes that are gone.
    dist.destroy_process_group()
