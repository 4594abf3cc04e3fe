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
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from unite_fast.distributed.environment import check_address
from unite_fast.distributed.peers import PATIENCE, LostContact
from unite_fast.distributed.process_group import Ranks, current_ranks
from unite_fast.errors import UserError


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def local_device(kind: str, ranks: Ranks) -> tuple[torch.device, str]:
    """This rank's device, and the backend of its process group. On CUDA that includes gloo, for collectives on the CPU.

    Args:
        kind: cpu or cuda; with several CUDA devices, each rank takes the one with its local rank.

    Raises:
        UserError: more processes on a machine than CUDA devices.
    """
    if kind != "cuda":
        return torch.device(kind), "gloo"
    devices = torch.cuda.device_count()
    # Compares counts, not the local rank, so that all ranks of a machine fail, rank 0 included.
    if ranks.per_node > devices:
        raise UserError(
            f"{ranks.per_node} processes on this machine, but torch sees {devices} CUDA devices; "
            "start one process per device"
        )
    torch.cuda.set_device(ranks.local_rank)
    return torch.device(kind, ranks.local_rank), "cpu:gloo,cuda:nccl"


@contextmanager
def join_training(device: str, timeout: float) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the process group of a training run, as torchrun's environment variables describe it, and leave it at the
    end. Without these variables the world size is 1 and there is no group.

    Args:
        device: cpu or cuda; with several CUDA devices, each rank takes the one with its local rank.
        timeout: seconds; see `ParallelConfig`.

    Raises:
        UserError: more processes on a machine than CUDA devices; `LostContact` if other ranks did not start.
    """
    ranks = Ranks.from_environment()
    if ranks.world == 1:
        yield ranks, torch.device(device)
        return
    own_device, backend = local_device(device, ranks)
    check_address()
    # The watchdog has a shorter timeout and a better message; this one is for the case that it hangs as well.
    longest = 1.1 * PATIENCE * timeout
    store, rank, world = fresh_store(longest)
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=longest)
    )
    yield ranks, own_device
    # Not after an error: it could wait for ranks that are gone.
    distributed.destroy_process_group()


@contextmanager
def ranks_of_torchrun(device: torch.device) -> Iterator[Ranks]:
    """Join the process group for sampling or evaluation, and leave it at the end; world size 1 without torchrun.

    Args:
        device: of type "cpu" or "cuda"; on CUDA this rank's own device becomes the current one.
    """
    ranks = Ranks.from_environment()
    if ranks.world == 1 or distributed.is_initialized():
        yield current_ranks()
        return
    _, backend = local_device(device.type, ranks)
    check_address()
    # Hours of work may lie between two collectives; torchrun notices a rank that dies.
    distributed.init_process_group(backend, timeout=timedelta(hours=12))
    yield current_ranks()
    # Not after an error: it could wait for ranks that are gone.
    distributed.destroy_process_group()


def fresh_store(timeout: float) -> tuple[Store, int, int]:
    """Store, rank and world size of this start, from torchrun's environment variables.

    torchrun 2.13 keeps one store over its restarts, with the addresses of dead processes still in it
    (https://github.com/pytorch/pytorch/issues/135712): a restarted group would wait for them for ever. So each start
    gets its own key prefix.

    Args:
        timeout: seconds to wait for the other ranks.

    Raises:
        LostContact: the other ranks did not join in time.
    """
    world = int(os.environ["WORLD_SIZE"])
    try:
        store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
        return PrefixStore(_agree_on_prefix(store, rank, world, timeout), store), rank, world
    except (distributed.DistError, TimeoutError) as error:
        raise LostContact(f"not all {world} processes joined within {timeout:g} s") from error


def _agree_on_prefix(store: Store, rank: int, world: int, timeout: float) -> str:
    """A key prefix on which all ranks of this start agree, although the store may hold keys of an earlier start.
    torchrun's restart count cannot be the prefix, since each machine has its own.

    Each rank writes a new token. Rank 0 proposes the tokens that it reads; each rank confirms a proposal that contains
    its token; a proposal that all have confirmed is accepted. A proposal with a dead rank's token never is.
    """
    token = secrets.token_hex(8)
    store.set(f"start/{rank}", token)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if rank == 0:
            store.set("start/proposal", ",".join(store.get(f"start/{other}").decode() for other in range(world)))
        proposal = store.get("start/proposal").decode()
        if token in proposal:
            store.set(f"start/confirmed/{rank}", proposal)
            if rank == 0 and all(_equals(store, f"start/confirmed/{other}", proposal) for other in range(world)):
                store.set("start/accepted", proposal)
            if _equals(store, "start/accepted", proposal):
                return f"start {proposal.partition(',')[0]}"
        time.sleep(0.05)
    raise TimeoutError


def _equals(store: Store, key: str, value: str) -> bool:
    return store.check([key]) and store.get(key).decode() == value


def launch_name() -> str:
    """Identifies this launch of torchrun, restarts included; empty without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    # "none" is torchrun's default name.
    return f"{socket.gethostname()}-{os.getppid()}" if name == "none" else name
