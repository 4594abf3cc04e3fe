"""Joining the processes that torchrun starts: devices, store, heartbeats, process group."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.distributed_c10d import Store

from unite_fast.distributed import joining
from unite_fast.distributed.hosts import use_hosts
from unite_fast.distributed.interface import GLOO_INTERFACE, choose_interface, own_address_towards
from unite_fast.distributed.peers import Peers
from unite_fast.distributed.process_group import Ranks, current_ranks
from unite_fast.distributed.start_check import check_same_start
from unite_fast.distributed.store import LostContact, fresh_store, gather
from unite_fast.distributed.watchdog import Watchdog, report_lost_contact
from unite_fast.errors import UserError

RECORDED_COLLECTIVES = "2000"
"""The last ones that PyTorch's flight recorder keeps, each about a kilobyte; see `training/flight_recorder.py`."""
BETWEEN_COLLECTIVES = timedelta(hours=12)
"""Hours of sampling may lie between two. The watchdog notices a rank that hangs or dies before."""
JOINING = 600.0
"""Seconds to wait for the next process at the start of sampling or evaluation; training has `parallel.timeout`."""


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
def join_training(
    device: str,
    timeout: float,
    start: dict[str, object] | None = None,
    record_mistake: Callable[[str], None] = lambda mistake: None,
) -> Iterator[tuple[Ranks, torch.device, Watchdog]]:
    """Join the process group of a training run, as torchrun's environment variables describe it, and leave it at the
    end. Without these variables the world size is 1 and there is no group.

    Args:
        device: cpu or cuda; with several CUDA devices, each rank takes the one with its local rank.
        timeout: seconds; see `ParallelConfig`.
        start: what must be the same on all ranks: settings, versions.
        record_mistake: called on each rank before the run ends because of a mistake of the user; see `Watchdog`.

    Raises:
        UserError: more processes on a machine than CUDA devices; a rank was started in another way; `LostContact` if
            other ranks did not start or died; `MistakeElsewhere` if one ended by a mistake of the user.
    """
    ranks = Ranks.from_environment()
    if ranks.world == 1:
        with Watchdog(Peers(), timeout, record_mistake) as watchdog, _announced_mistakes(watchdog):
            yield ranks, torch.device(device), watchdog
        return
    try:
        store, own_device, backend = _meet_all(device, ranks, start or {}, timeout)
    except UserError as error:
        if error.status == UserError.status:
            record_mistake(str(error))
        raise
    with (
        Watchdog(Peers(ranks.rank, ranks.world, store), timeout, record_mistake) as watchdog,
        _announced_mistakes(watchdog),
        report_lost_contact(watchdog),
    ):
        distributed.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=BETWEEN_COLLECTIVES
        )
        watchdog.peers.open_groups()
        watchdog.watch_next_rank()
        joining.end()
        yield ranks, own_device, watchdog
    # Not after an error: they could wait for ranks that are gone. Rank 0 may hold the store, so it ends last.
    ranks.wait()
    distributed.destroy_process_group()


def _meet_all(device: str, ranks: Ranks, start: dict[str, object], timeout: float) -> tuple[Store, torch.device, str]:
    """Meet the other ranks in the store and compare the start; returns the store, this rank's device and backend."""
    own_device, backend = local_device(device, ranks)
    # Gloo then connects two ranks when they first exchange something, and not all with all in each group.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDED_COLLECTIVES)
    store = fresh_store(timeout)
    meet(store, ranks, timeout)
    check_same_start(start, store, ranks, timeout)
    return store, own_device, backend


@contextmanager
def _announced_mistakes(watchdog: Watchdog) -> Iterator[None]:
    """Tell all ranks of a mistake of the user by which this one ends."""
    try:
        yield
    except LostContact:
        watchdog.before_exit()
        raise
    except UserError as error:
        if error.status == UserError.status:
            watchdog.end_all(error)
        raise


@contextmanager
def ranks_of_torchrun(device: torch.device) -> Iterator[Ranks]:
    """Join the process group for sampling or evaluation, and leave it at the end; world size 1 without torchrun.

    Args:
        device: of type "cpu" or "cuda"; on CUDA this rank's own device becomes the current one.
    """
    if distributed.is_initialized() or Ranks.from_environment().world == 1:
        yield current_ranks()
        return
    with join_training(device.type, JOINING) as (_, _, watchdog):
        # Hours of work may lie between two collectives. A rank that dies is noticed all the same.
        watchdog.timeout = float("inf")
        watchdog.beat(0, "sampling or evaluating")
        yield current_ranks()


def meet(store: Store, ranks: Ranks, timeout: float) -> None:
    """Learn the other machines' names and addresses, and choose the network interface that leads to them.

    Raises:
        LostContact: a rank ended meanwhile.
    """
    hosts = gather(store, "host", socket.gethostname(), ranks.rank, ranks.world, timeout)
    use_hosts(hosts)
    if ranks.nodes == 1:
        return
    # The machine to which MASTER_ADDR belongs may know it as a loopback address; then another machine's address leads
    # to the right interface.
    port = int(os.environ["MASTER_PORT"])
    own = own_address_towards(os.environ["MASTER_ADDR"], port)
    addresses = gather(store, "address", own, ranks.rank, ranks.world, timeout)
    if interface := choose_interface([os.environ["MASTER_ADDR"], *addresses], port):
        os.environ[GLOO_INTERFACE] = interface
