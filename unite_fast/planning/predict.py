"""Predict what a run needs on given GPUs: memory, time, communication and cost. No GPU is needed.

Time per image = matmul FLOPs / rate + convolution FLOPs / rate + elementwise bytes / memory bandwidth. Each optimizer
step adds the optimizers and the communication (bytes and latency) that does not overlap with compute. A step takes at
least the host's time to launch its kernels. Rates are shares of the published peaks, in two sets of assumptions: the
fast and the slow end of the range (assumptions.py).
"""

from dataclasses import dataclass

from unite_fast.config import IMAGES, Config, ModelConfig
from unite_fast.distributed import strategy as sharing
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError, require
from unite_fast.planning import flops, memory, step_bytes
from unite_fast.planning.assumptions import FAST, SLOW, Assumptions, Cluster
from unite_fast.planning.communication import Collective, collective_seconds, collectives, mesh
from unite_fast.planning.gpus import GPU
from unite_fast.planning.launches import step_launches
from unite_fast.recipes import from_tree

RESERVED = 0.05
"""Share of a GPU's memory that a plan leaves free."""
RELEASED_IMAGES_PER_S = 102.7
"""images/s per GPU of the released code, UNITE-B, F = 3, on 8 H200: its authors report 26 minutes per epoch."""
CPU_SECONDS = {"folder": 4.21e-3, "original": 4.04e-3, "cropped-jpeg": 1.83e-3, "raw": 0.12e-3}
"""CPU seconds to read an image, by format; docs/data.md says how they were measured."""


@dataclass(frozen=True)
class Work:
    """Work of one image, forward and backward."""

    matmul: float
    """FLOPs of bfloat16 matmuls."""
    float8: float
    """FLOPs of float8 matmuls."""
    attention: float
    """FLOPs of attention."""
    convolutions: float
    """FLOPs of LPIPS."""
    encoder_bytes: float
    """Elementwise and norm bytes of the encoder's blocks."""
    decoder_bytes: float
    """Elementwise and norm bytes of the decoder's layers."""
    float8_bytes: float
    """Bytes of rounding to float8."""
    lpips_bytes: float
    """Elementwise bytes of LPIPS."""
    pixel_bytes: float


def image_work(config: Config) -> Work:
    parts, moved = flops.parts(config), step_bytes.step_bytes(config)
    attention, in_float8 = flops.all_attention(config).total, flops.float8_flops(config)
    return Work(
        matmul=sum(part.total for name, part in parts.items() if name != "lpips") - attention - in_float8,
        float8=in_float8,
        attention=attention,
        convolutions=parts["lpips"].total,
        encoder_bytes=moved["encoder blocks: elementwise and norms"],
        decoder_bytes=moved["decoder layers: elementwise and norms"],
        float8_bytes=moved.get("rounding to float8", 0.0),
        lpips_bytes=moved.get("LPIPS, elementwise", 0.0),
        pixel_bytes=moved.get("pixels", 0.0),
    )


def image_seconds(work: Work, gpu: GPU, assumed: Assumptions) -> dict[str, float]:
    """Seconds of one image on one GPU, by part."""
    peak, bandwidth = gpu.tflops * 1e12, gpu.bandwidth * 1e12 * assumed.memory
    float8 = {}
    if work.float8:
        float8["float8 matmuls"] = work.float8 / (gpu.float8_tflops * 1e12 * assumed.matmul)
        float8["rounding to float8"] = work.float8_bytes / bandwidth
    return {
        "matmuls": work.matmul / (peak * assumed.matmul),
        **float8,
        "attention": work.attention / (peak * assumed.attention),
        "encoder elementwise": work.encoder_bytes / bandwidth,
        "decoder elementwise": work.decoder_bytes / bandwidth,
        "LPIPS convolutions": work.convolutions / (peak * assumed.convolutions),
        "LPIPS elementwise": work.lpips_bytes / bandwidth,
        "pixels": work.pixel_bytes / bandwidth,
    }


@dataclass(frozen=True)
class Speed:
    """Seconds of an optimizer step on one GPU by part, and the resulting rates."""

    seconds: dict[str, float]
    """"launches" is the time that the GPU waits for the host."""
    images_per_s: float
    """Images/s of all GPUs together."""
    mfu: float

    @property
    def bound_by(self) -> str:
        """The largest part; launches, if the host takes longer than the GPU."""
        return "launches" if self.seconds["launches"] else max(self.seconds, key=self.seconds.__getitem__)


def predict_speed(config: Config, cluster: Cluster, strategy: str, micro_steps: int, assumed: Assumptions) -> Speed:
    gpu, images = cluster.gpu, config.train.batch_size / cluster.gpus
    seconds = {name: images * each for name, each in image_seconds(image_work(config), gpu, assumed).items()}
    compute = sum(seconds.values())
    peak, bandwidth = gpu.tflops * 1e12 * assumed.matmul, gpu.bandwidth * 1e12 * assumed.memory
    shapes = flops.parameter_shapes(config.model)
    muon = flops.numel([shape for shape in shapes if shape.muon])
    owned = min(1.0, assumed.imbalance / cluster.gpus)
    newton_schulz = flops.newton_schulz(config.model) / peak + step_bytes.NEWTON_SCHULZ_BYTES * muon / bandwidth
    moved = step_bytes.MUON_BYTES * muon + step_bytes.ADAMW_BYTES * (flops.numel(shapes) - muon)
    seconds["optimizer"] = owned * newton_schulz + moved / mesh(strategy, cluster)[1] / bandwidth
    step_collectives = collectives(config, cluster, strategy, micro_steps)
    overlapping = sum(collective_seconds(one, cluster, assumed) for one in step_collectives if one.overlaps)
    exposed = sum(collective_seconds(one, cluster, assumed) for one in step_collectives if not one.overlaps)
    if assumed.overlap:
        overlapping = max(0.0, overlapping - compute * 2 / 3)  # two thirds of a step are backward passes
    seconds["communication"] = exposed + overlapping
    # The host runs ahead of the GPU, so that a step takes the longer of the two.
    host = assumed.launch * step_launches(config, mesh(strategy, cluster), micro_steps, step_collectives)
    seconds["launches"] = max(0.0, host - sum(seconds.values()))
    step = sum(seconds.values())
    rate = config.train.batch_size / step
    return Speed(seconds, rate, rate / cluster.gpus * flops.image_flops(config) / (gpu.tflops * 1e12))


def choose_strategy(config: Config, cluster: Cluster) -> tuple[str, str]:
    """(ddp, fsdp or hsdp, reason), as a run would choose."""
    ranks = Ranks(world=cluster.gpus, per_node=cluster.gpus_per_node)
    state = int(memory.training_state(config.model).total)
    chosen = sharing.choose_strategy(config.parallel, ranks, state, int(cluster.gpu.memory * 1e9))
    return "ddp" if cluster.gpus == 1 else chosen.name, chosen.why


def memory_parts(config: Config, cluster: Cluster, strategy: str, images: int) -> dict[str, float]:
    """Peak bytes of a step on one GPU by part, for a micro-batch of `images`."""
    state = memory.training_state(config.model, mesh(strategy, cluster)[1])
    saved = memory.activations(config)
    reconstruction_is_larger = saved.reconstruction > saved.flow
    parts = {
        "parameters": state.parameters,
        "gradients": state.gradients,
        "optimizers": state.optimizers,
        "EMA": state.ema,
    }
    if cluster.gpus == 1:
        total = flops.numel(flops.parameter_shapes(config.model))
        parts["weights in bfloat16"] = memory.HALF * total
        parts["weights in float8"] = memory.float8_weights(config)
        # Gradients of one pass, before they are accumulated. They grow while activations are freed.
        activations = images * (saved.reconstruction if reconstruction_is_larger else saved.flow)
        parts["gradients of a pass"] = max(0.0, memory.FLOAT * total - activations)
    else:
        # Replicated weights have a bfloat16 copy too, which is never freed.
        reshards = strategy != "ddp" and config.parallel.reshard_after_forward
        parts["gathered in bfloat16"] = memory.gathered_bytes(config.model, reshards)
        # Micro-batches accumulate unsharded gradients; the last one reduces them.
        parts["gradients"] = memory.training_state(config.model).gradients
    if reconstruction_is_larger:
        parts["tokenizer activations"] = images * saved.tokenizer + saved.patch_weight
        parts["decoder activations"] = images * saved.decoder
        parts["LPIPS activations"] = images * saved.lpips
    else:
        parts["flow activations"] = images * saved.flow
    parts["padded weights"] = saved.padding
    parts["LPIPS weights"] = memory.lpips_weights() if config.perceptual.weight else 0.0
    parts["workspace"] = memory.backward_workspace(config, images)
    parts["CUDA, NCCL, cuBLAS"] = memory.RUNTIME_BYTES
    parts = {name: size for name, size in parts.items() if size}
    parts["allocator slack"] = memory.SLACK * sum(parts.values())
    return parts


def micro_batches(share: int) -> list[int]:
    """Micro-batch sizes that divide a GPU's share of the batch, largest first."""
    return [size for size in range(share, 0, -1) if share % size == 0]


def fitting_micro_batch(config: Config, cluster: Cluster, strategy: str) -> int:
    """The largest micro-batch that fits; 0 if none does."""
    limit = cluster.gpu.memory * 1e9 * (1 - RESERVED)
    share = config.train.batch_size // cluster.gpus
    fitting = (n for n in micro_batches(share) if sum(memory_parts(config, cluster, strategy, n).values()) <= limit)
    return next(fitting, 0)


def has_released_speed(config: Config) -> bool:
    """Whether `RELEASED_IMAGES_PER_S` was measured for this model and number of flow draws."""
    sizes = from_tree(ModelConfig, {"encoder": {"preset": "B"}, "decoder": {"preset": "B"}})
    return config.model == sizes and config.objective.flow_draws == 3


@dataclass(frozen=True)
class Plan:
    config: Config
    cluster: Cluster
    strategy: str
    why: str
    micro_batch: int
    """The recipe's micro-batch, at most the GPU's share of the batch."""
    largest_micro_batch: int
    """The largest that fits; 0: none."""
    memory: dict[str, float]
    fast: Speed
    slow: Speed
    collectives: list[Collective]
    data: str
    """Format of the images, a key of `CPU_SECONDS`, or empty."""

    @property
    def micro_steps(self) -> int:
        return self.config.train.batch_size // self.cluster.gpus // self.micro_batch

    @property
    def images(self) -> int:
        """Images of the whole run."""
        return self.config.train.steps * self.config.train.batch_size

    @property
    def hours(self) -> tuple[float, float]:
        """Of the whole run, at the fast and the slow end."""
        return self.images / self.fast.images_per_s / 3600, self.images / self.slow.images_per_s / 3600

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= self.cluster.gpu.memory * 1e9 * (1 - RESERVED)


def make_plan(config: Config, cluster: Cluster, data: str = "") -> Plan:
    """Predict a run of `config` on `cluster`.

    Args:
        data: format of the images, a key of `CPU_SECONDS`; empty: from the recipe's data.source.

    Raises:
        UserError: settings that the prediction does not cover.
    """
    gpus, batch = cluster.gpus, config.train.batch_size
    require(
        batch % gpus == 0,
        f"train.batch_size is {batch}; it must be a multiple of the {gpus} GPUs that --nodes and --gpus-per-node give",
    )
    require(
        config.train.precision != "float32" and config.kernels != "reference",
        "a plan covers bfloat16, float8 and the fused kernels only; set train.precision=bfloat16 and kernels=auto",
    )
    require(
        config.train.precision != "float8" or cluster.gpu.float8,
        f"train.precision is float8, which {cluster.gpu.key} does not have; set train.precision=bfloat16",
    )
    require(
        not data or config.model.modality == IMAGES,
        "--data is a format of images, and this recipe is for molecules, which lie in memory; leave it out",
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
        collectives(config, cluster, strategy, share // micro),
        data,
    )
