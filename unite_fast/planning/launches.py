"""Kernels that the host launches in a step, one by one unless train.cuda_graph is set. While they are few and long, the
host is ahead of the GPU; with few images per GPU the GPU waits for the host.

The numbers are those of `benchmarks/launches.py`, in eager mode; tests compare them. Compiled blocks launch fewer.

FSDP's own launches are cheap, but its hooks in Python are not: at B's depth and tiny sizes it added 47 to 78 ms of CPU
time to a step under ddp on an AVX2 core, and 58 to 70 ms on an Intel Xeon with AMX (`benchmarks/host_time.py --ranks
8`). Its 700 launches at the slow end come to 52 ms.
"""

from unite_fast.config import MOLECULES, Config, ModelConfig
from unite_fast.model.layers import hidden_padding, hidden_width
from unite_fast.planning import flops
from unite_fast.planning.communication import Collective, muon_calls

BLOCK, LAYER, LPIPS, REST = 59, 27, 94, 241
"""Launches of a micro-batch: for each encoder block (tokenizer and flow, forward and backward), each decoder layer,
LPIPS, all else."""
PADDED_BLOCK = 35
"""More for each encoder block whose SwiGLU is padded (L)."""
FLOAT8 = 100
"""More for each block and layer: rounding."""
NEWTON_SCHULZ, UPDATES = 19, 6
"""Of the optimizers: for each batch of matrices that a rank owns, and for all parameters together."""
COLLECTIVE = 4
"""For each collective: copies into and out of its buffers, a cast or division, the collective."""


def micro_batch_launches(config: Config) -> int:
    model = config.model
    blocks, layers = model.encoder.depth, model.decoder.depth
    launches = BLOCK * blocks + LAYER * layers + REST + (LPIPS if config.perceptual.weight else 0)
    if hidden_padding(hidden_width(model.encoder.width)):
        launches += PADDED_BLOCK * blocks
    if config.train.precision == "float8":
        launches += FLOAT8 * (blocks + layers)
    return launches


def optimizer_launches(config: Config, replicas: int, shards: int) -> int:
    """Those of the rank with the most batches of matrices."""
    return NEWTON_SCHULZ * muon_calls(config.model, replicas, shards).buckets + UPDATES


def step_launches(config: Config, mesh: tuple[int, int], micro_steps: int, collectives: list[Collective]) -> int:
    """Launches of an optimizer step on (replicas, shards) ranks. A CUDA graph takes one for all passes."""
    optimizers = optimizer_launches(config, *mesh)
    if config.train.cuda_graph:
        return 1 + optimizers
    launches = micro_steps * micro_batch_launches(config) + optimizers
    if mesh != (1, 1):
        launches += COLLECTIVE * sum(each.calls for each in collectives)
        launches += gradient_additions(config.model, micro_steps) + weight_copies(config.model, mesh)
    return launches


def gradient_additions(model: ModelConfig, micro_steps: int) -> int:
    """On several ranks FSDP adds the gradients of a backward pass to those of the passes before one by one. The encoder
    has two passes in a micro-batch. The decoder has one, and so have the encoder's parameters that only the tokenizer
    reads: weight and bias of the patches' embedding, or six for atoms."""
    shapes = flops.parameter_shapes(model)
    once = sum(shape.count for shape in shapes if shape.part == "decoder") + (6 if model.modality == MOLECULES else 2)
    twice = sum(shape.count for shape in shapes) - once
    return twice * (2 * micro_steps - 1) + once * (micro_steps - 1)


def weight_copies(model: ModelConfig, mesh: tuple[int, int]) -> int:
    """Under ddp, FSDP copies each weight once a step in place of gathering it."""
    return sum(shape.count for shape in flops.parameter_shapes(model)) if mesh[1] == 1 else 0
