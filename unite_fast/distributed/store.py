"""The key-value store through which the ranks of a start meet, before there is a process group."""

import json
import os
import resource
import secrets
import socket
import time
from contextlib import suppress
from datetime import timedelta

from torch import distributed
from torch.distributed import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from unite_fast.distributed.agent import under_torchrun
from unite_fast.distributed.environment import check_address, read_environment
from unite_fast.distributed.hosts import name_ranks
from unite_fast.distributed.reach import wait_for_listener
from unite_fast.errors import CommonError, TemporaryError, UserError, reason_of

SILENCE = 24.0
"""Seconds without a sign of life after which a rank or its machine is gone: it lost power or network, which nothing
else tells. Longer than anything that keeps a healthy process from running its threads."""
STORE_ERRORS = (distributed.DistError, RuntimeError, TimeoutError)
"""What requests to a store raise when it is gone."""
MISTAKE = "start/mistake"
"""Key of a mistake for which a rank ended before it joined."""


class LostContact(TemporaryError):
    """Another rank is gone or does not answer: restart and resume."""


class MistakeElsewhere(CommonError):
    """Another rank ended by a mistake of the user. The message names it."""


def kept_by_torchrun() -> bool:
    """Whether torchrun keeps the store over its restarts; otherwise rank 0 of each start has a new one."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def allow_many_files() -> None:
    """Allow this process as many open files as the system lets it: each connection to another rank takes one."""
    with suppress(ValueError, OSError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_store(timeout: float) -> Store:
    """Connect to the store at MASTER_ADDR and MASTER_PORT; rank 0 makes it, unless torchrun has.

    Args:
        timeout: seconds to wait for the store, and in each request for a key.

    Raises:
        UserError: the address is missing or wrong.
        LostContact: there is no store.
    """
    check_address()
    allow_many_files()
    ranks, address = read_environment(), (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    makes_it = ranks.rank == 0 and not kept_by_torchrun()
    # Where torchrun runs, the machine of rank 0 was there a moment ago; other launchers may not have started it yet.
    silence = SILENCE if under_torchrun() else timeout
    start = time.monotonic()
    # torch would print each attempt to connect, with a stack of its C++ functions.
    if not makes_it and not wait_for_listener(*address, timeout, silence):
        raise LostContact(
            f"cannot reach rank 0 at {address[0]}, port {address[1]}, from {socket.gethostname()} in "
            f"{min(timeout, round(time.monotonic() - start)):g} s: is it up, does its name resolve here, does a "
            "firewall block the port?"
        )
    try:
        return TCPStore(
            *address,
            world_size=ranks.world,
            is_master=makes_it,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except STORE_ERRORS as error:
        what = f"rank 0 cannot listen at port {address[1]}" if makes_it else f"lost rank 0 at {address[0]}"
        raise LostContact(f"{what}: {reason_of(error)}") from error


def fresh_store(timeout: float) -> Store:
    """The store, with keys of this start alone.

    torchrun 2.13 keeps one store over its restarts, with the addresses of dead processes still in it
    (https://github.com/pytorch/pytorch/issues/135712): a restarted group would wait for them for ever. So each start
    gets its own key prefix.

    Args:
        timeout: seconds to wait for the store, and then until the next rank joins.

    Raises:
        LostContact: the other ranks did not join in time.
        MistakeElsewhere: another rank ended before it joined.
    """
    ranks, store = read_environment(), open_store(timeout)
    try:
        return PrefixStore(_agree_on_prefix(store, ranks.rank, ranks.world, timeout), store)
    except STORE_ERRORS as error:
        raise LostContact("rank 0 ended while the processes joined") from error


def _agree_on_prefix(store: Store, rank: int, world: int, timeout: float) -> str:
    """A key prefix on which all ranks of this start agree, although the store may hold keys of an earlier start.
    torchrun's restart count cannot be the prefix, since each machine has its own.

    Each rank writes a new token. Rank 0 proposes the tokens that it reads; each rank confirms a proposal that contains
    its token; a proposal that all have confirmed is accepted. A proposal with a dead rank's token never is.
    """
    token = secrets.token_hex(8)
    store.set(f"start/{rank}", token)
    tokens, confirmed = ([f"start/{kind}{other}" for other in range(world)] for kind in ("", "confirmed/"))
    joined, deadline = 0, time.monotonic() + timeout
    # Many ranks ask less often, so that the store has time for all of them.
    pause = 0.05 + 5e-4 * world
    while time.monotonic() < deadline:
        if mistake := announced_mistake(store):
            note_mistake_seen(store)
            raise MistakeElsewhere(mistake)
        there = [number for number, key in enumerate(tokens) if store.check([key])] if rank == 0 else []
        if len(there) > joined:
            joined, deadline = len(there), time.monotonic() + timeout
        if len(there) == world:
            store.set("start/proposal", ",".join(text.decode() for text in store.multi_get(tokens)))
        proposal = store.get("start/proposal").decode() if store.check(["start/proposal"]) else ""
        if token in proposal:
            store.set(f"start/confirmed/{rank}", proposal)
            if rank == 0 and store.check(confirmed):
                answers = [text.decode() for text in store.multi_get(confirmed)]
                if all(answer == proposal for answer in answers):
                    store.set("start/accepted", proposal)
            if _equals(store, "start/accepted", proposal):
                return f"start {proposal.partition(',')[0]}"
        time.sleep(pause)
    missing = [number for number, key in enumerate(tokens) if not store.check([key])]
    raise LostContact(_not_joined(missing, world, timeout))


def _equals(store: Store, key: str, value: str) -> bool:
    return store.check([key]) and store.get(key).decode() == value


def _not_joined(missing: list[int], world: int, timeout: float) -> str:
    per_node = read_environment().per_node
    machines = sorted({rank // per_node + 1 for rank in missing})
    which = f": {name_ranks(missing)} did not" if missing else ""
    if world > per_node and missing:
        which += f" (machine {', '.join(map(str, machines))} of {world // per_node}, in torchrun's order)"
    return f"not all {world} processes joined within {timeout:g} s{which}"


def gather(store: Store, name: str, value: str, rank: int, world: int, timeout: float) -> list[str]:
    """All-gather of a text per rank: rank 0 collects, and the others read once.

    Raises:
        LostContact: a rank did not write its text in time.
    """
    store.set(f"{name}/{rank}", value)
    keys = [f"{name}/{other}" for other in range(world)]
    if rank == 0:
        wait_for(store, keys, timeout)
        store.set(name, json.dumps([text.decode() for text in store.multi_get(keys)]))
    wait_for(store, [name], timeout)
    return json.loads(store.get(name))


def wait_for(store: Store, keys: list[str], timeout: float) -> None:
    """Wait until the store has all of these keys, without blocking it.

    Raises:
        LostContact: it has not within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not store.check(keys):
        if time.monotonic() > deadline:
            raise LostContact(f"no answer from another process within {timeout:g} s")
        time.sleep(0.02)


def announce_early_mistake(message: str, timeout: float = 30.0) -> None:
    """Tell the ranks that wait for this one to join that it ended by a mistake.

    Args:
        timeout: seconds to reach the store, and for rank 0 until all know it.
    """
    ranks = read_environment()
    with suppress(UserError, *STORE_ERRORS):  # then they wait until their own limit
        store = open_store(timeout)
        if not store.check([MISTAKE]):
            where = f" on {socket.gethostname()}" if ranks.several_machines else ""
            store.set(MISTAKE, f"rank {ranks.rank}{where}: {message}")
        note_mistake_seen(store, timeout)


def announced_mistake(store: Store) -> str:
    """The mistake for which a rank ended before it joined, and who; empty if none did.

    Args:
        store: from `open_store`.
    """
    return store.get(MISTAKE).decode() if store.check([MISTAKE]) else ""


def note_mistake_seen(store: Store, timeout: float = 30.0) -> None:
    """Tell that this rank knows of a mistake. Rank 0, which may hold the store, waits until all do, or for `timeout`
    seconds."""
    ranks = read_environment()
    with suppress(LostContact, *STORE_ERRORS):
        store.set(f"{MISTAKE}/seen/{ranks.rank}", "")
        if ranks.rank == 0:
            wait_for(store, [f"{MISTAKE}/seen/{rank}" for rank in range(ranks.world)], timeout)
