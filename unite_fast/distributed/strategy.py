"""How the ranks of a run share the batch and the training state."""

from dataclasses import dataclass

from unite_fast.config import ParallelConfig
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import require

REPLICATED_SHARE = 0.25
"""Of a device's memory: a training state up to this size is replicated (see `choose_strategy`)."""


def share(ranks: Ranks, batch_size: int, micro_batch: int) -> tuple[slice, int]:
    """This process's places in the global batch, and how many of them go through the model at once.

    Raises:
        UserError: the batch cannot be divided so.
    """
    own = batch_size // ranks.world
    require(
        batch_size % ranks.world == 0,
        f"train.batch_size is {batch_size}; it must be a multiple of the number of processes ({ranks.world})",
    )
    micro = min(micro_batch or own, own)
    require(
        own % micro == 0,
        f"train.micro_batch is {micro_batch}; it must divide the {own} images of train.batch_size "
        f"({batch_size}) that each of {ranks.world} processes has",
    )
    return slice(ranks.rank * own, (ranks.rank + 1) * own), micro


@dataclass(frozen=True)
class Strategy:
    name: str
    """ddp, fsdp or hsdp; none for a single process."""
    mesh: tuple[int, int]
    """R and S: groups that hold the same, and the processes that each is divided among."""
    why: str
    reshard: bool
    """Whether a block lets go of its gathered weights after each pass; otherwise it keeps them until the step ends."""


UNSHARDED = Strategy("none", (1, 1), "one process", False)


def choose_strategy(config: ParallelConfig, ranks: Ranks, state: int, memory: int) -> Strategy:
    """How the processes share the training state, and why so.

    Replication is the cheaper way for as long as it fits. It sends each gradient once a step (8 bytes a parameter, a
    float32 all-reduce); sharding sends the weights too, in bfloat16 and in every micro-batch: forward and backward, for
    the tokenizer's pass and the flow's (4 + 8 m bytes for m micro-batches). A state of at most a quarter of the memory
    leaves three quarters to activations, and sharding it could not spare more than that quarter.

    Args:
        state: bytes of the whole training state.
        memory: bytes of one process's device.

    Raises:
        UserError: hsdp on machines with different numbers of processes.
    """
    if ranks.world == 1:
        return UNSHARDED
    limit = REPLICATED_SHARE * memory
    size = f"the training state takes {state / 1e9:.2f} GB"
    name, why = config.strategy, "as set"
    if name == "auto" and state <= limit:
        name, why = "ddp", f"{size}, and up to {limit / 1e9:.1f} GB, a quarter of a device's memory, is replicated"
    elif name == "auto":
        name = "hsdp" if ranks.nodes > 1 else "fsdp"
        where = "within each machine" if ranks.nodes > 1 else "over all processes"
        why = f"{size}, above {limit / 1e9:.1f} GB, a quarter of a device's memory: it is divided {where}"
    mesh = {"ddp": (ranks.world, 1), "fsdp": (1, ranks.world), "hsdp": (ranks.nodes, ranks.per_node)}[name]
    require(
        mesh[0] * mesh[1] == ranks.world,
        f"hsdp wants as many processes on each machine, but {ranks.world} are no multiple of the {ranks.per_node} "
        "here; start as many on each, or set parallel.strategy=fsdp",
    )
    # What a process holds whole it would only copy again.
    return Strategy(name, mesh, why, config.reshard_after_forward and mesh[1] > 1)
