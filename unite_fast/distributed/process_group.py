"""This process among the processes of a run, and the collectives on the CPU that need no tensors of the model."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unite_fast.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process's rank, as torchrun counts. With a world size of 1, every collective returns its input."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Rank within the machine."""
    per_node: int = 1
    """Processes on each machine."""
    group: dist.ProcessGroup | None = field(default=None, compare=False)
    """Process group of the collectives; None: the default one."""

    @classmethod
    def of_environment(cls) -> "Ranks":
        """From the environment variables that torchrun sets; a world of 1 without them."""
        names = {"rank": "RANK", "world": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "per_node": "LOCAL_WORLD_SIZE"}
        return cls(**{name: int(os.environ[key]) for name, key in names.items() if key in os.environ})

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.world // self.per_node

    def with_own_group(self, timeout: timedelta | None = None) -> "Ranks":
        """The same ranks with a new gloo group, for collectives that run beside those of training. All ranks call it
        together."""
        return replace(self, group=dist.new_group(backend="gloo", timeout=timeout)) if self.world > 1 else self

    def wait(self) -> None:
        """Barrier."""
        if self.world > 1:
            dist.barrier(self.group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def largest(self, number: int) -> "Largest":
        """Start to find the largest of the numbers that the ranks give; nobody waits here."""
        tensor = torch.tensor([number])
        work = None
        if self.world > 1:
            work = dist.all_reduce(tensor, dist.ReduceOp.MAX, self.group, async_op=True)
        return Largest(tensor, work)

    def gather(self, value: Any) -> list:
        """The values of all ranks, in the order of ranks, on every rank."""
        if self.world == 1:
            return [value]
        values: list = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def run_on_all(self, work: Callable[[], Any]) -> list:
        """Run `work` on every rank and gather the results. If it fails on any rank, all ranks raise that error.

        Raises:
            Exception: that of the lowest rank on which `work` failed.
        """
        try:
            outcome = (True, work())
        except (UserError, OSError) as error:
            outcome = (False, error)
        except Exception as error:
            # An error that cannot be pickled would leave the other ranks waiting.
            outcome = (False, RuntimeError(f"{type(error).__name__}: {error}"))
        outcomes = self.gather(outcome)
        for succeeded, result in outcomes:
            if not succeeded:
                raise result
        return [result for _, result in outcomes]

    def run_on_first(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 alone; every rank gets its result, or raises its error."""
        return self.run_on_all(lambda: work() if self.main else None)[0]

    def batches(self, count: int, batch: int) -> Iterator[range]:
        """This rank's batches of `count` numbered samples. The batches are the same for any world size, so a sample is
        always computed among the same neighbours, to the same bits."""
        starts = range(0, count, batch)
        return (range(start, min(start + batch, count)) for start in starts[self.rank :: self.world])


ALONE = Ranks()


@dataclass
class Largest:
    """The pending result of `Ranks.largest`. It is on the CPU, so no device waits."""

    number: Tensor
    work: dist.Work | None

    def result(self) -> int:
        if self.work is not None:
            self.work.wait()
        return int(self.number)


def current_ranks() -> Ranks:
    """From the process group, if it is initialised."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()
