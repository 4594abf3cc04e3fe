"""torchrun's environment variables, checked. Imports no torch."""

import os
from typing import NamedTuple

from unite_fast.errors import UserError, require, shown

_HINT = "start with torchrun, or unset WORLD_SIZE"


class Environment(NamedTuple):
    """Rank and world size; the defaults are those of a process alone."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    per_node: int = 1

    @property
    def several_machines(self) -> bool:
        return self.world > self.per_node


def read_environment() -> Environment:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.

    Raises:
        UserError: one is missing, no number, or out of range.
    """
    world = _number("WORLD_SIZE", 1)
    require(world >= 1, f"WORLD_SIZE is {world}: it must be positive; {_HINT}")
    if world == 1:
        return Environment()
    per_node = _number("LOCAL_WORLD_SIZE", 1)
    rank, local_rank = _number("RANK"), _number("LOCAL_RANK")
    require(0 <= rank < world, f"RANK is {rank}: it must be in 0..{world - 1}, below WORLD_SIZE; {_HINT}")
    require(1 <= per_node <= world, f"LOCAL_WORLD_SIZE is {per_node}: it must be in 1..{world}; {_HINT}")
    # Other launchers may not set LOCAL_WORLD_SIZE.
    most = per_node if "LOCAL_WORLD_SIZE" in os.environ else world
    require(0 <= local_rank < most, f"LOCAL_RANK is {local_rank}: it must be in 0..{most - 1}; {_HINT}")
    return Environment(rank, world, local_rank, per_node)


def restart_count() -> int:
    """How often torchrun restarted the processes; 0 without torchrun.

    Raises:
        UserError: TORCHELASTIC_RESTART_COUNT is no number.
    """
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def restarts_left() -> bool:
    """Whether torchrun would restart the processes after a failure; False without torchrun.

    Raises:
        UserError: see `restart_count`.
    """
    return _number("TORCHELASTIC_MAX_RESTARTS", 0) > restart_count()


def check_address() -> None:
    """Check where the processes meet: MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: one is missing or wrong.
    """
    port = _number("MASTER_PORT")
    require(0 < port < 2**16, f"MASTER_PORT is {port}: it must be in 1..65535; {_HINT}")
    require(bool(os.environ.get("MASTER_ADDR")), f"MASTER_ADDR is missing; {_HINT}")


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None:
        if default is None:
            raise UserError(f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')}, but {name} is missing; {_HINT}")
        return default
    # int() would take spaces, underscores and other scripts' digits.
    digits = text.removeprefix("-")
    require(
        digits.isascii() and digits.isdigit() and len(digits) < 10,
        f"the environment variable {name} is {shown(text)}, no whole number; start with torchrun, or unset "
        f"{'WORLD_SIZE' if 'RANK' in name else name}",
    )
    return int(text)
