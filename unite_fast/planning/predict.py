"""What a run will need on GPUs that need not be there: memory, time, communication, cost. All of it is predicted.

Time of an image = products / their rate + convolutions / theirs + bytes of elementwise work / memory's rate, to which
come, once an optimizer step, the optimizers and what of the communication no computation hides. The rates are shares of
the published peaks, in two sets of assumptions: the fast and the slow end of the range.
"""

from dataclasses import dataclass

from unite_fast.config import PRESETS, Config, DecoderConfig, EncoderConfig, ModelConfig
from unite_fast.distributed import strategy as sharing
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError, require
from unite_fast.planning import flops, memory
from unite_fast.planning.gpus import GPU

BLOCK_BYTES = 138
"""Elementwise and norm bytes per (token x channel) of an encoder block, both passes, Triton bodies and a float32
residual, with what is made again; `python benchmarks/kernels.py --block` counts them."""
DECODER_BYTES = 211
"""The same of a decoder layer, counted by hand: 0.5 GB an image for decoder B."""
LPIPS_BYTES = 8_204
"""Bytes a pixel that LPIPS's operators other than convolutions move with the Triton bodies, dropout masks included,
operator by operator; tests/planning/test_predict.py counts them again."""
OPTIMIZER_BYTES = 64
"""Bytes a parameter of one optimizer step: clip 12, momentum 12, Nesterov 12, cast 6, update 10, EMA 12."""
NEWTON_SCHULZ_BYTES = 58
"""Bytes a parameter: five iterations read an iterate four times and write it once, in bfloat16; 8 to begin."""
RESERVED = 0.05
"""Share of a GPU's memory that a plan leaves free."""
RELEASED_IMAGES_PER_S = 102.7
"""Of the released code, UNITE-B, F = 3, a GPU of 8 H200: its authors' 26 minutes an epoch."""
CPU_SECONDS = {"folder": 4.21e-3, "original": 4.04e-3, "cropped-jpeg": 1.83e-3, "raw": 0.12e-3}
"""CPU seconds to read an image, by format; docs/data.md has how they were measured."""


@dataclass(frozen=True)
class Assumptions:
    """Shares of published rates that are reached."""

    name: str
    products: float
    convolutions: float
    memory: float
    links: float
    """Of links within a node and of the network."""
    hidden: bool
    """Whether communication that can run beside the backward pass does."""
    imbalance: float
    """Newton-Schulz work of the busiest GPU over an even share."""


FAST = Assumptions("fast", products=0.65, convolutions=0.50, memory=0.85, links=0.8, hidden=True, imbalance=1.0)
SLOW = Assumptions("slow", products=0.45, convolutions=0.35, memory=0.65, links=0.5, hidden=False, imbalance=2.0)


@dataclass(frozen=True)
class Work:
    """Of one image."""

    products: float
    """FLOPs of products and attention."""
    convolutions: float
    """FLOPs of LPIPS."""
    moved: float
    """Bytes of the model's elementwise and norm work."""
    lpips_moved: float
    """Bytes of LPIPS's."""


@dataclass(frozen=True)
class Cluster:
    gpu: GPU
    nodes: int
    gpus_per_node: int

    def __post_init__(self):
        require(self.nodes > 0 and self.gpus_per_node > 0, "--nodes and --gpus-per-node must be positive")

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


def image_work(config: Config) -> Work:
    parts = flops.parts(config)
    model, draws = config.model, config.objective.flow_draws
    token_blocks = sum(
        passes * (tokens + wanted) / 2
        for with_image, passes in ((True, 1), (False, draws))
        for tokens, wanted in flops.wanted_tokens(model, with_image)
    )
    decoder = (model.latent_tokens + 1) * model.decoder.depth * model.decoder.width
    moved = BLOCK_BYTES * token_blocks * model.encoder.width + DECODER_BYTES * decoder
    lpips_moved = LPIPS_BYTES * model.image_size**2 if config.perceptual.weight else 0
    products = sum(part.total for name, part in parts.items() if name != "lpips")
    return Work(products, parts["lpips"].total, moved, lpips_moved)


def image_seconds(work: Work, gpu: GPU, assumed: Assumptions) -> dict[str, float]:
    """Seconds of one image on one GPU, by what they are spent on."""
    peak, bandwidth = gpu.tflops * 1e12, gpu.bandwidth * 1e12 * assumed.memory
    return {
        "products": work.products / (peak * assumed.products),
        "elementwise": work.moved / bandwidth,
        "LPIPS convolutions": work.convolutions / (peak * assumed.convolutions),
        "LPIPS elementwise": work.lpips_moved / bandwidth,
    }


@dataclass(frozen=True)
class Exchange:
    """One kind of communication, of an optimizer step."""

    name: str
    size: float
    """Bytes of the whole tensors."""
    times: int
    scope: int
    """GPUs that take part in one."""
    overlaps: bool
    """Whether other work can run beside it."""
    across: bool = False
    """Among one GPU of each node, and not among the GPUs of a node."""


def exchanges(config: Config, cluster: Cluster, strategy: str, micro_steps: int) -> list[Exchange]:
    """What is sent in an optimizer step: float32 gradients, bfloat16 parameters, bfloat16 updates of Muon."""
    shapes = flops.parameter_shapes(config.model)
    every, muon = memory.numbers(shapes), memory.numbers([shape for shape in shapes if shape.muon])
    encoder = flops.parameters(config.model)["encoder"]
    if cluster.gpus == 1:
        return []
    if strategy == "ddp":
        return [
            Exchange("all-reduce of gradients", memory.FLOAT * every, 2, cluster.gpus, True),
            Exchange("all-gather of Muon's updates", memory.HALF * muon, 1, cluster.gpus, False),
        ]
    scope = cluster.gpus if strategy == "fsdp" else min(cluster.gpus, cluster.gpus_per_node)
    gathered, times = memory.HALF * (every + encoder), 2 * micro_steps
    if not config.parallel.reshard_after_forward:
        gathered, times = memory.HALF * every, 1  # kept until the step ends
    found = [
        Exchange("all-gather of parameters", gathered, times, scope, True),
        Exchange("reduce-scatter of gradients", memory.FLOAT * every, 1, scope, True),
        Exchange("all-to-all of Muon's matrices", 2 * memory.HALF * muon / scope, 1, scope, False),
    ]
    if strategy == "hsdp" and cluster.nodes > 1:
        size = memory.FLOAT * every / cluster.gpus_per_node
        found.append(Exchange("all-reduce of gradients across nodes", size, 2, cluster.nodes, True, across=True))
        size = memory.HALF * muon / cluster.gpus_per_node
        found.append(Exchange("all-gather of Muon's updates across nodes", size, 1, cluster.nodes, False, across=True))
    return found


def exchange_seconds(exchange: Exchange, cluster: Cluster, assumed: Assumptions) -> float:
    """Seconds of all gatherings or reduce-scatters of one kind, node by node: within a node each GPU receives what the
    others have by its link, across nodes its part of it by its share of the network. Bytes alone are counted: on many
    GPUs the start of each operation, which is neglected, comes to matter."""
    within, nodes = min(exchange.scope, cluster.gpus_per_node), -(-exchange.scope // cluster.gpus_per_node)
    if exchange.across:
        within, nodes = 1, cluster.nodes
    once = exchange.size * (within - 1) / within / (cluster.gpu.link * 1e9)
    once += exchange.size * (nodes - 1) / nodes / within / (cluster.gpu.network * 1e9)
    return exchange.times * once / assumed.links


@dataclass(frozen=True)
class Speed:
    """Seconds of an optimizer step on one GPU by part, and what follows."""

    seconds: dict[str, float]
    images_per_s: float
    """Of all GPUs."""
    share_of_peak: float

    @property
    def bound_by(self) -> str:
        return max(self.seconds, key=self.seconds.__getitem__)


def predict_speed(config: Config, cluster: Cluster, strategy: str, micro_steps: int, assumed: Assumptions) -> Speed:
    gpu, images = cluster.gpu, config.train.batch_size / cluster.gpus
    seconds = {name: images * each for name, each in image_seconds(image_work(config), gpu, assumed).items()}
    compute = sum(seconds.values())
    peak, bandwidth = gpu.tflops * 1e12 * assumed.products, gpu.bandwidth * 1e12 * assumed.memory
    every = memory.numbers(flops.parameter_shapes(config.model))
    owned = min(1.0, assumed.imbalance / cluster.gpus)
    seconds["optimizer"] = owned * (flops.newton_schulz(config.model) / peak + NEWTON_SCHULZ_BYTES * every / bandwidth)
    seconds["optimizer"] += OPTIMIZER_BYTES * every / shards(strategy, cluster) / bandwidth
    sent = exchanges(config, cluster, strategy, micro_steps)
    beside = sum(exchange_seconds(one, cluster, assumed) for one in sent if one.overlaps)
    alone = sum(exchange_seconds(one, cluster, assumed) for one in sent if not one.overlaps)
    # Two thirds of a step are backward passes.
    seconds["communication"] = alone + (max(0.0, beside - compute * 2 / 3) if assumed.hidden else beside)
    step = sum(seconds.values())
    rate = config.train.batch_size / step
    return Speed(seconds, rate, rate / cluster.gpus * flops.image_flops(config) / (gpu.tflops * 1e12))


def shards(strategy: str, cluster: Cluster) -> int:
    """Processes among which the training state is divided."""
    return {"ddp": 1, "fsdp": cluster.gpus, "hsdp": min(cluster.gpus, cluster.gpus_per_node)}[strategy]


def choose_strategy(config: Config, cluster: Cluster) -> tuple[str, str]:
    """(ddp, fsdp or hsdp, why), as a run would choose."""
    ranks = Ranks(world=cluster.gpus, per_node=cluster.gpus_per_node)
    state = int(memory.training_state(config.model).total)
    chosen = sharing.choose_strategy(config.parallel, ranks, state, int(cluster.gpu.memory * 1e9))
    return "ddp" if cluster.gpus == 1 else chosen.name, chosen.why


def memory_parts(config: Config, cluster: Cluster, strategy: str, images: int) -> dict[str, float]:
    """Bytes on one GPU at the fullest moment of a step, by part, for a micro-batch of `images`."""
    state = memory.training_state(config.model, shards(strategy, cluster))
    kept = memory.activations(config)
    reconstruction_is_larger = kept.reconstruction > kept.flow
    parts = {
        "parameters": state.parameters,
        "gradients": state.gradients,
        "optimizers": state.optimizers,
        "EMA": state.ema,
    }
    if cluster.gpus == 1:
        every = memory.numbers(flops.parameter_shapes(config.model))
        parts["weights in bfloat16"] = memory.HALF * every
        # Of a pass, until they are added to those before it. They grow while activations are let go.
        activations = images * (kept.reconstruction if reconstruction_is_larger else kept.flow)
        parts["gradients of a pass"] = max(0.0, memory.FLOAT * every - activations)
    else:
        # Replicated weights have a bfloat16 copy too, and nothing to let go of.
        lets_go = strategy != "ddp" and config.parallel.reshard_after_forward
        parts["gathered in bfloat16"] = memory.gathered(config.model, lets_go)
        # Micro-batches accumulate whole gradients, and the last one reduces them.
        parts["gradients"] = memory.training_state(config.model).gradients
    if reconstruction_is_larger:
        parts["tokenizer activations"] = images * kept.tokenizer + kept.patch_weight
        parts["decoder activations"] = images * kept.decoder
        parts["LPIPS activations"] = images * kept.lpips
    else:
        parts["flow activations"] = images * kept.flow
    parts["padded weights"] = kept.padding
    parts["LPIPS weights"] = memory.lpips_weights() if config.perceptual.weight else 0.0
    parts["workspace"] = memory.backward_workspace(config, images)
    parts["CUDA, NCCL, cuBLAS"] = memory.RUNTIME_BYTES
    parts = {name: size for name, size in parts.items() if size}
    parts["allocator slack"] = memory.SLACK * sum(parts.values())
    return parts


def micro_batches(share: int) -> list[int]:
    """The micro-batches that divide a GPU's share of a batch, largest first."""
    return [size for size in range(share, 0, -1) if share % size == 0]


def fitting_micro_batch(config: Config, cluster: Cluster, strategy: str) -> int:
    """The largest micro-batch that fits; 0: none does."""
    room = cluster.gpu.memory * 1e9 * (1 - RESERVED)
    share = config.train.batch_size // cluster.gpus
    fitting = (n for n in micro_batches(share) if sum(memory_parts(config, cluster, strategy, n).values()) <= room)
    return next(fitting, 0)


def of_released_speed(config: Config) -> bool:
    """Whether `RELEASED_IMAGES_PER_S` is of this model and number of flow draws."""
    sizes = ModelConfig(
        encoder=EncoderConfig(**PRESETS[EncoderConfig]["B"]), decoder=DecoderConfig(**PRESETS[DecoderConfig]["B"])
    )
    return config.model == sizes and config.objective.flow_draws == 3


@dataclass(frozen=True)
class Plan:
    config: Config
    cluster: Cluster
    strategy: str
    why: str
    micro_batch: int
    """Images a forward pass of one GPU, as the recipe says, capped at the GPU's share of the batch."""
    largest: int
    """The largest that fits; 0: none."""
    memory: dict[str, float]
    fast: Speed
    slow: Speed
    exchanges: list[Exchange]
    data: str

    @property
    def micro_steps(self) -> int:
        return self.config.train.batch_size // self.cluster.gpus // self.micro_batch

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= self.cluster.gpu.memory * 1e9 * (1 - RESERVED)


def make_plan(config: Config, cluster: Cluster, data: str = "") -> Plan:
    """
    Args:
        data: what the images are read from, a key of `CPU_SECONDS`; empty: as the recipe's data.source says.

    Raises:
        UserError: settings that cannot be planned for.
    """
    gpus, batch = cluster.gpus, config.train.batch_size
    require(
        batch % gpus == 0,
        f"train.batch_size is {batch}; it must be a multiple of the {gpus} GPUs that --nodes and --gpus-per-node give",
    )
    require(
        config.train.precision == "bfloat16" and config.kernels != "reference",
        "a plan is for bfloat16 and the fused kernels; set train.precision=bfloat16 and kernels=auto",
    )
    data = data or {"folder": "folder", "shards": "raw"}.get(config.data.source, "")
    if data and data not in CPU_SECONDS:
        raise UserError(f"--data is {data!r}; it must be one of {', '.join(CPU_SECONDS)}")
    strategy, why = choose_strategy(config, cluster)
    share = batch // gpus
    _, micro = sharing.split_batch(Ranks(world=gpus), batch, config.train.micro_batch)
    fast, slow = (predict_speed(config, cluster, strategy, share // micro, assumed) for assumed in (FAST, SLOW))
    return Plan(
        config,
        cluster,
        strategy,
        why,
        micro,
        fitting_micro_batch(config, cluster, strategy),
        memory_parts(config, cluster, strategy, micro),
        fast,
        slow,
        exchanges(config, cluster, strategy, share // micro),
        data,
    )
