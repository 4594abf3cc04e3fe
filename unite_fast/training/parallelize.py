"""Several processes as one: who they are, how they share the training state, which gradients they add up and when.

One mechanism serves every strategy, PyTorch's `fully_shard` on a mesh of R x S processes. Each of R groups holds the
whole training state, cut into S parts: ddp is N x 1, fsdp 1 x N, hsdp nodes x processes of a node. A single process
shards nothing and has plain tensors.
"""

import math
import os
import warnings
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from unite_fast.config import Config
from unite_fast.distributed.process_group import Ranks
from unite_fast.distributed.strategy import Strategy, choose_strategy
from unite_fast.model.layers import RMSNorm
from unite_fast.model.unite import UNITE
from unite_fast.optim.param_groups import split_parameters


def state_bytes(model: nn.Module) -> int:
    """Of the whole training state in float32: parameters, gradients, averages, Muon's momentum, AdamW's two moments."""
    muon, adamw = (sum(p.numel() for p in part.values()) for part in split_parameters(model))
    return 4 * (4 * muon + 5 * adamw)


def device_memory(device: torch.device, ranks: Ranks) -> int:
    """Bytes that this process may use: its device's, or its part of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks.per_node


def build_model(config: Config, ranks: Ranks, device: torch.device) -> tuple[UNITE, Strategy]:
    """A model with start values, sharded if there are several processes. No process ever holds all of a sharded model:
    it is built without memory, divided, and filled one parameter at a time."""
    with torch.device("meta"):
        model = UNITE(config.model)
    # Machines may differ, and all must choose the same: by the least memory, and groups that fit into each machine.
    per_node, free = zip(*ranks.gather((ranks.per_node, device_memory(device, ranks))), strict=True)
    alike = replace(ranks, per_node=math.gcd(*per_node))
    strategy = choose_strategy(config.parallel, alike, state_bytes(model), min(free))
    if config.train.compile:
        compile_blocks(model)
    if ranks.world > 1:
        mesh = init_device_mesh(device.type, strategy.mesh, mesh_dim_names=("replicate", "shard"))
        shard(model, mesh, strategy.reshard, config.train.precision)
    model.to_empty(device=device)
    model.initialize(config.seed)
    if ranks.world > 1:
        # FSDP takes what runs first for the root of everything; a run may begin by drawing with the encoder alone.
        fully_shard.state(model)._lazy_init()
    return model, strategy


def compile_blocks(model: UNITE) -> None:
    """Compile each transformer block on its own: blocks of one kind share the compiled code."""
    torch._dynamo.config.recompile_limit = 64  # a block meets several sequence lengths, each compiled for itself
    for block in (*model.encoder.blocks, *model.decoder.layers):
        block.compile(dynamic=False)


def shard(model: UNITE, mesh: DeviceMesh, reshard: bool, precision: str) -> None:
    """Divide a model's parameters over a mesh, one group for each block and decoder layer, one for all adaLN Linears,
    and one for what else the encoder, the decoder and the model have.

    The Linears of blocks, layers and adaLN are gathered in bfloat16 where training is in bfloat16: their products are
    anyway. The rest is small, and float32 as in one process: norms, whose weights near 1 bfloat16 would round to steps
    larger than an update; time embedding and tables, which would make the residual bfloat16. Gradients are added up in
    float32, and the weights that the optimizers see are float32.
    """
    groups, parts = mesh.shape
    low = torch.bfloat16 if precision == "bfloat16" else None
    # Inputs keep their precision: the residual is float32.
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    inner = dict(mesh=mesh, shard_placement_fn=placement(parts), mp_policy=policy)
    outer = dict(mesh=mesh, shard_placement_fn=placement(parts), reshard_after_forward=False)
    for part, layers in ((model.encoder, model.encoder.blocks), (model.decoder, model.decoder.layers)):
        gather_with(part, fully_shard([norm for layer in layers for norm in norms(layer)], **outer))
        for layer in layers:
            fully_shard(layer, reshard_after_forward=reshard, **inner)
    # Read and not called either: one product takes them all.
    gather_with(model.encoder, fully_shard(list(model.encoder.modulation), **(outer | {"mp_policy": policy})))
    for module in (model.encoder, model.decoder, model):
        fully_shard(module, **outer)
    # The model has no forward pass of its own. These use its LayerNorm; `decode` is the decoder's alone.
    for method in ("tokenize", "denoise", "denoising_loss"):
        register_fsdp_forward_method(model, method)
    # What it warns of, a change in place of what a module returned, no code here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    # Gloo knows no mean, and NCCL's may be wrong of one process, as across the groups of fsdp.
    if mesh.device_type == "cpu" or groups == 1:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def norms(layer: nn.Module) -> list[nn.Module]:
    return [module for module in layer.modules() if isinstance(module, RMSNorm | nn.LayerNorm)]


def gather_with(part: nn.Module, group: list[FSDPModule]) -> None:
    """Gather a group whose modules are never called, only read, when `part` is called. FSDP lets go of it and adds its
    gradients up at the end of the backward pass, as of all that it has not seen before."""
    part.register_forward_pre_hook(lambda *_: group[0].unshard())


def placement(parts: int):
    """Where `fully_shard` cuts a parameter: along its first dimension or, where that is shorter than the parts, along
    the first other one that can be divided evenly."""

    def place(parameter: nn.Parameter) -> Shard | None:
        if parameter.shape[0] >= parts:
            return None
        return next((Shard(dim) for dim, n in enumerate(parameter.shape) if dim and n % parts == 0), None)

    return place


def reduce_gradients(model: UNITE, strategy: Strategy, decoder: bool, rest: bool) -> None:
    """Whether the next backward pass adds the gradients up over the processes, those of the decoder and the others.

    Else they stay where they are, and a later pass adds them up with its own. `rest` marks a step's last pass.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(rest)
        model.decoder.set_requires_gradient_sync(decoder)
        # After the last pass always: the optimizers change the parts, and what was gathered of them is of the past.
        model.set_reshard_after_backward(strategy.reshard or rest)
