"""Joining the processes that torchrun starts: devices, rendezvous, process group."""

import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from unite_fast.distributed.peers import PATIENCE, LostContact
from unite_fast.distributed.process_group import Ranks, current_ranks
from unite_fast.errors import UserError


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


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
def joined(device: str, timeout: float) -> Iterator[tuple[Ranks, torch.device]]:
    """Find the other processes by the environment variables that torchrun sets; alone where there are none.

    Args:
        device: cpu or cuda; of several CUDA devices, this process takes the one of its number on the machine.
        timeout: seconds; see `ParallelConfig`.

    Raises:
        UserError: more processes on a machine than it has CUDA devices; `LostContact`, the others did not come.
    """
    ranks = Ranks.of_environment()
    if ranks.world == 1:
        yield ranks, torch.device(device)
        return
    own, backend = own_device(device, ranks)
    # The watchdog comes first, and says more; this is for the case that it is stuck as well.
    longest = 1.1 * PATIENCE * timeout
    store, rank, world = fresh_store(longest)
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=longest)
    )
    yield ranks, own
    # Not after an error: it could wait for processes that are gone.
    distributed.destroy_process_group()


@contextmanager
def ranks_of_torchrun(device: torch.device) -> Iterator[Ranks]:
    """Joins the processes that torchrun started, if it did, and leaves them at the end.

    Args:
        device: of kind "cpu" or "cuda"; the current CUDA device becomes this process's own.
    """
    ranks = Ranks.of_environment()
    if ranks.world == 1 or distributed.is_initialized():
        yield current_ranks()
        return
    # Processes meet seldom, with hours of work between; one that dies is torchrun's to notice.
    distributed.init_process_group(own_device(device.type, ranks)[1], timeout=timedelta(hours=12))
    yield current_ranks()
    # Not after an error: it could wait for processes that are gone.
    distributed.destroy_process_group()


def fresh_store(timeout: float) -> tuple[distributed.Store, int, int]:
    """The store through which the processes of one start find each other, with rank and number of processes, from the
    environment variables that torchrun sets.

    torchrun 2.13 keeps one store over its restarts, and the addresses of processes that died stand in it still
    (https://github.com/pytorch/pytorch/issues/135712): a restarted group would wait for them for ever. So the keys of
    each start have a prefix of their own.

    Args:
        timeout: seconds that a process waits for the others.

    Raises:
        LostContact: they did not come.
    """
    world = int(os.environ["WORLD_SIZE"])
    try:
        store, rank, world = next(distributed.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        return distributed.PrefixStore(_name_of_start(store, rank, world, timeout), store), rank, world
    except (distributed.DistError, TimeoutError) as error:
        raise LostContact(f"not all {world} processes came to the start within {timeout:g} s") from error


def _name_of_start(store: distributed.Store, rank: int, world: int, timeout: float) -> str:
    """A name on which the processes agree, although the store may hold what others wrote in a start before. torchrun's
    count of restarts does not serve: each machine has its own.

    Each writes a new number. Rank 0 proposes the numbers that it finds; each confirms a proposal with its own number in
    it; what all have confirmed holds. A proposal with a number of a process that is gone never gets as far.
    """
    mine = secrets.token_hex(8)
    store.set(f"start/{rank}", mine)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if rank == 0:
            store.set("start/proposal", ",".join(store.get(f"start/{other}").decode() for other in range(world)))
        proposal = store.get("start/proposal").decode()
        if mine in proposal:
            store.set(f"start/confirmed/{rank}", proposal)
            if rank == 0 and all(_is(store, f"start/confirmed/{other}", proposal) for other in range(world)):
                store.set("start/held", proposal)
            if _is(store, "start/held", proposal):
                return f"start {proposal.partition(',')[0]}"
        time.sleep(0.05)
    raise TimeoutError


def _is(store: distributed.Store, key: str, value: str) -> bool:
    return store.check([key]) and store.get(key).decode() == value


def launch_name() -> str:
    """Tells this start by torchrun, its restarts included, from others."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    # What torchrun calls it where nobody chose a name.
    return f"{socket.gethostname()}-{os.getppid()}" if name == "none" else name
