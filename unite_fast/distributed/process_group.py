"""This process's rank, and collectives on the CPU for numbers and Python objects."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from unite_fast.distributed.environment import read_environment
from unite_fast.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """Rank and world size, as torchrun counts them. With a world size of 1, every collective returns its input."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Rank within the machine."""
    per_node: int = 1
    """Processes on each machine."""
    group: dist.ProcessGroup | None = field(default=None, compare=False)
    """Process group of the collectives; None: the default one."""

    @classmethod
    def from_environment(cls) -> "Ranks":
        """From torchrun's environment variables; world size 1 without them.

        Raises:
            UserError: see `read_environment`.
        """
        return cls(*read_environment())

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.world // self.per_node

    def with_own_group(self, timeout: timedelta | None = None) -> "Ranks":
        """The same ranks with a new gloo group, for collectives that run beside those of training. All ranks call this
        together."""
        if self.world == 1:
            return self
        # `new_group` returns an int only on ranks outside the group; all ranks are in this one.
        return replace(self, group=cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout)))

    def wait(self) -> None:
        """Barrier."""
        if self.world > 1:
            dist.barrier(self.group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def start_max(self, *numbers: int) -> "PendingMax":
        """Start an all-reduce (max) of each of these numbers; does not wait."""
        tensor = torch.tensor(numbers)
        work = None
        if self.world > 1:
            work = dist.all_reduce(tensor, dist.ReduceOp.MAX, self.group, async_op=True)
        return PendingMax(tensor, work)

    def gather(self, value: Any) -> list:
        """All-gather: the values of all ranks, in rank order."""
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
            Exception: the error of the lowest rank on which `work` failed; its `raised_by` is that rank.
        """
        if self.world == 1:
            return [work()]
        try:
            outcome = (True, work())
        except (UserError, OSError) as error:
            outcome = (False, error)
        except Exception as error:
            # An error that cannot be pickled would leave the other ranks waiting.
            outcome = (False, RuntimeError(f"{type(error).__name__}: {error}"))
        outcomes = self.gather(outcome)
        for rank, (succeeded, result) in enumerate(outcomes):
            if not succeeded:
                result.raised_by = rank
                raise result
        return [result for _, result in outcomes]

    def run_on_first(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0; every rank returns its result or raises its error."""
        return self.run_on_all(lambda: work() if self.main else None)[0]

    def batches(self, count: int, batch: int) -> Iterator[range]:
        """This rank's batches of samples 0 .. count - 1. The batches are the same for every world size, so each sample
        is computed in the same batch, to the same bits."""
        starts = range(0, count, batch)
        return (range(start, min(start + batch, count)) for start in starts[self.rank :: self.world])


ALONE = Ranks()


@dataclass
class PendingMax:
    """The pending result of `Ranks.start_max`, on the CPU, so no device waits for it."""

    numbers: Tensor
    work: dist.Work | None

    def result(self) -> list[int]:
        if self.work is not None:
            self.work.wait()
        return self.numbers.tolist()


def current_ranks() -> Ranks:
    """Rank and world size of the default process group; world size 1 if there is none."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()
