"""How the ranks of a run split the batch and the training state."""

from dataclasses import dataclass

from unite_fast.config import ParallelConfig
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import require

REPLICATED_FRACTION = 0.25
"""A training state of up to this fraction of a device's memory is replicated (see `choose_strategy`)."""


def split_batch(ranks: Ranks, batch_size: int, micro_batch: int) -> tuple[slice, int]:
    """This rank's slice of the global batch, and its micro-batch size (all of the slice if `micro_batch` is 0).

    Raises:
        UserError: the batch cannot be divided like this.
    """
    per_rank = batch_size // ranks.world
    require(
        batch_size % ranks.world == 0,
        f"train.batch_size is {batch_size}; it must be a multiple of the number of processes ({ranks.world})",
    )
    micro = min(micro_batch or per_rank, per_rank)
    require(
        per_rank % micro == 0,
        f"train.micro_batch is {micro_batch}; it must divide {per_rank}, the images per process "
        f"(train.batch_size {batch_size} on {ranks.world} processes)",
    )
    return slice(ranks.rank * per_rank, (ranks.rank + 1) * per_rank), micro


@dataclass(frozen=True)
class Strategy:
    name: str
    """ddp, fsdp or hsdp; none for a single process."""
    mesh: tuple[int, int]
    """(R, S): R replicas of the training state, each sharded over S ranks."""
    why: str
    """The reason for the choice, for the log."""
    reshard: bool
    """Whether a block frees its gathered weights after each pass; otherwise it keeps them until the end of the step."""


UNSHARDED = Strategy("none", (1, 1), "one process", False)


def choose_strategy(config: ParallelConfig, ranks: Ranks, state: int, memory: int) -> Strategy:
    """Replicate the training state while it fits, shard it otherwise.

    Replication communicates less: each gradient once per step (8 bytes per parameter, a float32 all-reduce). Sharding
    also gathers the weights, in bfloat16, in every micro-batch: in forward and backward of the tokenizer pass and of
    the flow pass (4 + 8 m bytes for m micro-batches). A state of at most a quarter of the memory leaves three quarters
    for activations, and sharding could save no more than that quarter.

    Args:
        state: size of the whole training state, bytes.
        memory: memory of one rank's device, bytes.

    Raises:
        UserError: hsdp on machines with different numbers of processes.
    """
    if ranks.world == 1:
        return UNSHARDED
    limit = REPLICATED_FRACTION * memory
    size = f"the training state takes {state / 1e9:.2f} GB"
    name, why = config.strategy, "as set"
    if name == "auto" and state <= limit:
        name = "ddp"
        why = f"{size}, at most {limit / 1e9:.1f} GB (a quarter of a device's memory), so it is replicated"
    elif name == "auto":
        name = "hsdp" if ranks.nodes > 1 else "fsdp"
        where = "within each machine" if ranks.nodes > 1 else "over all processes"
        why = f"{size}, more than {limit / 1e9:.1f} GB (a quarter of a device's memory), so it is sharded {where}"
    mesh = {"ddp": (ranks.world, 1), "fsdp": (1, ranks.world), "hsdp": (ranks.nodes, ranks.per_node)}[name]
    require(
        mesh[0] * mesh[1] == ranks.world,
        f"hsdp needs the same number of processes on each machine, but {ranks.world} is not a multiple of the "
        f"{ranks.per_node} here; start as many on each, or set parallel.strategy=fsdp",
    )
    # With one shard per replica there is nothing to gather, and resharding would only copy.
    return Strategy(name, mesh, why, config.reshard_after_forward and mesh[1] > 1)
