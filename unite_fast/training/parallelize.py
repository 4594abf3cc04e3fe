"""Building the model, sharding it over ranks, and reducing its gradients.

All strategies use PyTorch's `fully_shard` on an R x S mesh: R replicas of the training state, each sharded over S
ranks. ddp is N x 1, fsdp 1 x N, hsdp nodes x ranks per node. A single process has plain tensors.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from unite_fast.config import Config
from unite_fast.distributed.process_group import Ranks
from unite_fast.distributed.strategy import Strategy, choose_strategy
from unite_fast.errors import require
from unite_fast.model.layers import RMSNorm
from unite_fast.model.unite import UNITE
from unite_fast.optim.param_groups import split_parameters
from unite_fast.utils.device import host_memory


def state_bytes(model: nn.Module) -> int:
    """Bytes of the whole training state, in float32: parameters, gradients, averages, optimizer moments."""
    # Muon has one moment per parameter, AdamW two.
    muon, adamw = (sum(p.numel() for p in group.values()) for group in split_parameters(model))
    return 4 * (4 * muon + 5 * adamw)


def device_memory(device: torch.device, ranks: Ranks) -> int:
    """Memory of this rank's device in bytes; on a CPU, this rank's share of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory() // ranks.per_node


def build_model(config: Config, ranks: Ranks, device: torch.device) -> tuple[UNITE, Strategy]:
    """An initialised model, sharded if there are several ranks. No rank ever holds a whole sharded model: it is built
    on the meta device, sharded, and initialised one parameter at a time (`UNITE.initialize`).

    Raises:
        UserError: the training state does not fit into memory.
    """
    with torch.device("meta"):
        model = UNITE(config.model)
    # Machines may differ, but all ranks must choose alike: use the smallest memory, and groups that fit each machine.
    per_node, memory = zip(*ranks.gather((ranks.per_node, device_memory(device, ranks))), strict=True)
    common = replace(ranks, per_node=math.gcd(*per_node))
    strategy = choose_strategy(config.parallel, common, state_bytes(model), min(memory))
    share = state_bytes(model) // strategy.mesh[1]
    require(
        share <= min(memory),
        f"the training state takes {share / 1e9:,.1f} GB per process, but each has only {min(memory) / 1e9:,.1f} GB of "
        "memory: out of memory; use a smaller model, or more processes with parallel.strategy=fsdp",
    )
    if config.train.compile:
        compile_blocks(model)
    if ranks.world > 1:
        mesh = init_device_mesh(device.type, strategy.mesh, mesh_dim_names=("replicate", "shard"))
        shard(model, mesh, strategy.reshard, config.train.network_precision)
    model.to_empty(device=device)
    model.initialize(config.seed)
    if ranks.world > 1:
        # FSDP takes the module that runs first as the root, and a run may start with sampling, in the encoder alone.
        fully_shard.state(model)._lazy_init()  # pyright: ignore[reportFunctionMemberAccess]  # set by torch's decorator
    return model, strategy


def compile_blocks(model: UNITE) -> None:
    """Compile each transformer block by itself; blocks of the same class share the compiled code."""
    torch._dynamo.config.recompile_limit = 64  # one compilation per sequence length
    for block in (*model.encoder.blocks, *model.decoder.layers):
        block.compile(dynamic=False)


def shard(model: UNITE, mesh: DeviceMesh, reshard: bool, precision: str) -> None:
    """Shard a model over a mesh. One group each: the Linears of every block and decoder layer, the norms
    in all blocks, the norms in all decoder layers, all adaLN Linears, the rest of the encoder, of the decoder and of
    the model.

    With bfloat16 training, the Linears of blocks, layers and adaLN are gathered in bfloat16, as their matmuls need
    them. The rest is small and stays float32: norm weights near 1, whose updates bfloat16 would round away, and time
    embedding and tables, which would make the residual bfloat16. Gradients are reduced in float32, and optimizers see
    float32 weights.
    """
    replicas, shards = mesh.shape
    # cast_forward_inputs=False: the residual stays float32.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bfloat16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    shard_module: Callable = partial(fully_shard, mesh=mesh, shard_placement_fn=placement(shards))
    shard_outer: Callable = partial(shard_module, reshard_after_forward=False)
    for module, layers in ((model.encoder, model.encoder.blocks), (model.decoder, model.decoder.layers)):
        gather_with(module, shard_outer([norm for layer in layers for norm in norms(layer)]))
        for layer in layers:
            shard_module(layer, reshard_after_forward=reshard, mp_policy=policy)
    # Like the norms, these are read and never called: one matmul takes them all.
    gather_with(model.encoder, shard_outer(list(model.encoder.modulation), mp_policy=policy))
    for module in (model.encoder, model.decoder, model):
        shard_outer(module)
    # The model has no forward(). These methods use its LayerNorm; `decode` only calls the decoder.
    for method in ("tokenize", "denoise", "denoising_loss"):
        register_fsdp_forward_method(model, method)
    # A warning about changing a module's output in place, which no code here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    # Gloo has no mean, and NCCL's may be wrong over a group of one rank, as fsdp has across replicas.
    if mesh.device_type == "cpu" or replicas == 1:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def norms(layer: nn.Module) -> list[nn.Module]:
    return [module for module in layer.modules() if isinstance(module, RMSNorm | nn.LayerNorm)]


def gather_with(module: nn.Module, group: list[FSDPModule]) -> None:
    """Gather a group whose modules are read and never called, when `module` is called. FSDP reshards it and reduces its
    gradients at the end of the backward pass."""
    module.register_forward_pre_hook(lambda *_: group[0].unshard())


def placement(shards: int) -> Callable[[nn.Parameter], Shard | None]:
    """The dimension along which `fully_shard` cuts a parameter: the first (None) or, if that is shorter than the number
    of shards, the first other one that divides evenly."""

    def place(parameter: nn.Parameter) -> Shard | None:
        if parameter.shape[0] >= shards:
            return None
        return next((Shard(dim) for dim, n in enumerate(parameter.shape) if dim and n % shards == 0), None)

    return place


def reduce_gradients(model: UNITE, strategy: Strategy, decoder: bool, others: bool) -> None:
    """Set which gradients the next backward pass reduces over the ranks: the decoder's, and all others. The rest stay
    on the rank, and a later pass reduces them with its own. `others` is True only in the last pass of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(others)
        cast(FSDPModule, model.decoder).set_requires_gradient_sync(decoder)  # sharded like the model
        # Always reshard after the last backward: the optimizer is about to update the shards, so gathered copies would
        # be stale.
        model.set_reshard_after_backward(strategy.reshard or others)
