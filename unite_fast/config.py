"""The settings: typed, each with its default and a line of what it does. `recipes.py` reads them from files.

Values that make no sense are `UserError`s that name the dotted key.
"""

import math
from dataclasses import dataclass, field, fields, replace

from unite_fast.data_pipeline.choice import LOADERS
from unite_fast.errors import UserError
from unite_fast.kernels import backend
from unite_fast.optim import adamw
from unite_fast.perceptual import PerceptualConfig

NONDETERMINISTIC = ("sdpa_cudnn", "flash_attn")
"""Kinds of attention whose backward pass adds up in an order that changes from run to run."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{key} is {value!r}; it must be one of {', '.join(choices)}")


@dataclass
class EncoderConfig:
    """The Generative Encoder. `preset: B` (M, L, XL) fills in a published size."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    in_context_tokens: int = 32
    """Label tokens prepended before block `in_context_start`; 0 for none."""
    in_context_start: int = 4
    qk_norm: bool = True

    def __post_init__(self):
        check_transformer("model.encoder", self.width, self.depth, self.heads)
        require(self.width // self.heads % 2 == 0, "model.encoder.width / heads must be even: RoPE turns pairs")
        require(self.in_context_tokens >= 0, "model.encoder.in_context_tokens must not be negative")
        require(
            self.in_context_tokens == 0 or 0 <= self.in_context_start < self.depth,
            f"model.encoder.in_context_start must be one of the blocks 0..{self.depth - 1}",
        )


@dataclass
class DecoderConfig:
    """The pixel decoder. `preset: S` (B, L) fills in a published size."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    embed_width: int = 768
    """Width between the decoder's two input Linears; 768 in every published size."""

    def __post_init__(self):
        check_transformer("model.decoder", self.width, self.depth, self.heads)
        require(self.width % 4 == 0, "model.decoder.width must be a multiple of 4: 2-D sin-cos positions")
        require(self.mlp_width > 0 and self.embed_width > 0, "model.decoder.mlp_width and embed_width must be positive")


def check_transformer(key: str, width: int, depth: int, heads: int) -> None:
    require(width > 0 and depth > 0 and heads > 0, f"{key}: width, depth and heads must be positive")
    require(width % heads == 0, f"{key}.width is {width}; it must be a multiple of heads ({heads})")


PRESETS = {
    EncoderConfig: {
        "B": dict(width=768, depth=12, heads=12),
        "M": dict(width=1024, depth=12, heads=16),
        "L": dict(width=1024, depth=24, heads=16),
        "XL": dict(width=1152, depth=28, heads=16),
    },
    DecoderConfig: {
        "S": dict(width=384, depth=12, heads=6, mlp_width=1536),
        "B": dict(width=768, depth=12, heads=12, mlp_width=3072),
        "L": dict(width=1024, depth=24, heads=16, mlp_width=4096),
    },
}


@dataclass
class ModelConfig:
    image_size: int = 256
    """Side of the square images, pixels."""
    patch_size: int = 16
    latent_channels: int = 32
    latent_tokens: int = 0
    """0: as many as there are patches, which is also what the decoder needs."""
    num_classes: int = 1000
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self):
        require(self.patch_size > 0 and self.image_size > 0, "model.image_size and patch_size must be positive")
        require(
            self.image_size % self.patch_size == 0,
            f"model.image_size is {self.image_size}; it must be a multiple of model.patch_size ({self.patch_size})",
        )
        require(self.latent_channels > 1, "model.latent_channels must be at least 2: LayerNorm runs over them")
        require(self.num_classes > 0, "model.num_classes must be positive")
        self.latent_tokens = self.latent_tokens or self.patches
        require(
            self.latent_tokens == self.patches,
            f"model.latent_tokens is {self.latent_tokens}; it must be {self.patches}: the decoder makes each a patch",
        )

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass
class DataConfig:
    source: str = "digits"
    """digits (built into scikit-learn), folder (one folder a class), idx (MNIST's file format), shards (made by
    unite-fast shards) or synthetic (noise, to time a machine with)."""
    path: str = ""
    """Folder of the data; for shards also https://HOST/FOLDER or pipe:COMMAND with {} for a file's name."""
    loader: str = "auto"
    """auto (the fastest that fits), memory, folder, raw, webdataset or dali; see docs/data.md."""
    flip: bool = True
    """Random horizontal flip."""
    workers: int = 2
    """Processes (or threads, where nothing is decoded) that read images ahead of need."""

    def __post_init__(self):
        require_choice("data.loader", self.loader, LOADERS)
        require(self.workers >= 0, "data.workers must not be negative")


@dataclass
class ObjectiveConfig:
    """The joint loss. The defaults are the released recipe's."""

    flow_draws: int = 3
    """F, flow draws an image: 3 in the released recipe, 14 for the published checkpoints."""
    flow_weight: float = 1.0
    time_mean: float = 0.0
    """Mean and standard deviation of the normal u in s = sigmoid(u)."""
    time_std: float = 1.0
    time_shift: float = 0.5
    """a in t = a s / (1 + (a - 1) s)."""
    tokenize_time_max: float = 0.01
    decoder_noise_probability: float = 0.5
    decoder_noise_time_min: float = 0.7
    label_drop: float = 0.1

    def __post_init__(self):
        require(self.flow_draws > 0, "objective.flow_draws must be positive")
        require(self.time_shift > 0, "objective.time_shift must be positive")
        require(self.time_std >= 0, "objective.time_std must not be negative")
        for name in ("decoder_noise_probability", "decoder_noise_time_min", "label_drop", "tokenize_time_max"):
            require(0 <= getattr(self, name) <= 1, f"objective.{name} must be in [0, 1]")


@dataclass
class ScheduleConfig:
    """Learning rate by optimizer step: 0 -> lr, held, cosine to lr_2, held, cosine to lr_final, held."""

    lr: float = 1.0e-4
    lr_2: float = 0.5e-4
    lr_final: float = 1.0e-5
    reference_batch: int = 384
    """The three rates are for this batch size and grow in proportion to the real one; 0: take them as they are."""
    warmup_steps: int = 0
    hold_until: int = 0
    decay_until: int = 0
    """Start and end of the cosine to lr_2; decay_until 0: it never comes."""
    final_from: int = 0
    final_until: int = 0
    """Start and end of the cosine to lr_final; final_until 0: it never comes, as in the released recipe."""

    def __post_init__(self):
        stages = [self.warmup_steps]
        if self.decay_until:
            stages += [self.hold_until, self.decay_until]
        if self.final_until:
            stages += [self.final_from, self.final_until]
        require(
            stages == sorted(stages) and stages[0] >= 0,
            "schedule: warmup_steps <= hold_until <= decay_until (<= final_from <= final_until) must hold",
        )
        require(
            not self.final_until or bool(self.decay_until),
            "schedule.final_until is set without schedule.decay_until: the first cosine comes before the second",
        )
        for name in ("lr", "lr_2", "lr_final", "reference_batch"):
            require(getattr(self, name) >= 0, f"schedule.{name} must not be negative")


@dataclass
class OptimConfig:
    clip_norm: float = 3.0
    ema_decay: float = 0.9978
    muon_momentum: float = 0.95
    muon_dtype: str = "bfloat16"
    """Precision of the Newton-Schulz products: bfloat16 (released) or float32."""
    adamw: str = "torch"
    """Whose AdamW runs: torch's fused one, or apex, NVIDIA's, which you have to build yourself."""
    adamw_betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    """Of both optimizers."""
    nonfinite: str = "stop"
    """What gradients that are not finite do: stop ends the run and names the step, skip leaves weights, optimizers and
    averages as they are and goes on."""

    def __post_init__(self):
        require(self.clip_norm > 0, "optim.clip_norm must be positive")
        require(0 <= self.ema_decay < 1, "optim.ema_decay must be in [0, 1)")
        require(0 <= self.muon_momentum < 1, "optim.muon_momentum must be in [0, 1)")
        require(all(0 <= beta < 1 for beta in self.adamw_betas), "optim.adamw_betas must be in [0, 1)")
        require(self.eps > 0, "optim.eps must be positive")
        require_choice("optim.muon_dtype", self.muon_dtype, ("bfloat16", "float32"))
        require_choice("optim.adamw", self.adamw, adamw.BODIES)
        require_choice("optim.nonfinite", self.nonfinite, ("stop", "skip"))
        require(
            self.nonfinite == "stop" or self.adamw == "torch",
            "optim.nonfinite is skip, but apex's optimizer cannot skip a step; set optim.adamw=torch",
        )


@dataclass
class TrainConfig:
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 1024
    """Images an optimizer step, over all processes and micro-batches."""
    micro_batch: int = 0
    """Images a forward pass of one process, at most its share of the batch; 0: the share at once."""
    precision: str = "bfloat16"
    """bfloat16 (autocast) or float32."""
    device: str = "auto"
    """auto (a CUDA device if there is one), cpu or cuda."""
    threads: int = 0
    """Threads of torch on a CPU; 0: torch's choice. Tiny models gain little from two and may lose much."""
    compile: bool = True
    """Compile the transformer blocks."""
    deterministic: bool = False
    """The same seed gives the same bits on a GPU too. Slower: attention's backward pass adds up in a fixed order. On a
    CPU this holds without it."""
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are never pruned; 0: only the newest two are kept."""
    picture_every: int = 0
    """Steps between sample and reconstruction grids; 0: only at the end."""
    evaluate_every: int = 0
    """Steps between evaluations of the averaged weights (see `evaluation`); 0: none."""
    evaluate_epochs: float = 0.0
    """The same in passes over the training images, of which it may be a part; give one of the two."""
    out: str = ""
    """Folder of the run; empty: runs/NAME."""
    wandb: str = ""
    """Project on Weights & Biases that gets every logged row; empty: none."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
            require(getattr(self, name) > 0, f"train.{name} must be positive")
        for name in ("micro_batch", "keep_every", "picture_every", "evaluate_every", "evaluate_epochs", "threads"):
            require(getattr(self, name) >= 0, f"train.{name} must not be negative")
        require(
            not (self.evaluate_every and self.evaluate_epochs),
            "train.evaluate_every and train.evaluate_epochs are two ways to say when; give one of them",
        )
        require(
            self.micro_batch == 0 or self.batch_size % self.micro_batch == 0,
            f"train.batch_size is {self.batch_size}; it must be a multiple of train.micro_batch ({self.micro_batch})",
        )
        require_choice("train.precision", self.precision, ("bfloat16", "float32"))
        require_choice("train.device", self.device, ("auto", "cpu", "cuda"))


@dataclass
class ProfileConfig:
    """A trace of some steps by torch's profiler, in the run's folder."""

    steps: str = ""
    """FIRST:LAST, from step FIRST up to step LAST, which is not traced any more (the first step is 1); empty: none."""

    def __post_init__(self):
        _ = self.traced

    @property
    def traced(self) -> range:
        """The steps to trace."""
        if not self.steps:
            return range(0)
        first, colon, last = self.steps.partition(":")
        whole = bool(colon) and all(part.isdecimal() and len(part) < 19 for part in (first, last))
        require(whole, f"profile.steps is {self.steps!r}; write FIRST:LAST, for example 10:13")
        require(0 < int(first) < int(last), f"profile.steps is {self.steps}; FIRST must be at least 1 and below LAST")
        return range(int(first), int(last))


@dataclass
class ParallelConfig:
    """How several processes share the work; a single one needs none of it."""

    strategy: str = "auto"
    """ddp (every process holds the whole training state), fsdp (each holds a part), hsdp (a part within a machine, the
    same on every machine) or auto, which chooses by the state's size and the machines and says why."""
    reshard_after_forward: bool = True
    """Let go of a block's gathered weights between forward and backward pass: less memory, one more gathering."""
    timeout: float = 600.0
    """Seconds without progress after which a process ends itself: the images of a batch, a forward and backward pass,
    another process. Ten times that for the start, the first step, a checkpoint, pictures, an evaluation."""

    def __post_init__(self):
        require_choice("parallel.strategy", self.strategy, ("auto", "ddp", "fsdp", "hsdp"))
        require(self.timeout > 0, "parallel.timeout must be positive")


@dataclass
class SamplingConfig:
    """How pictures are generated."""

    solver: str = "multistep"
    """euler, heun, multistep (second order, the cheapest) or dopri5 (adaptive: the released code's); solvers.py."""
    steps: int = 24
    """Steps of the fixed-step solvers; dopri5 chooses its own. With 24, multistep matches dopri5's Frechet distance on
    the small recipes within 1 %, at less than a third of its evaluations; below 16 it is several percent off
    (benchmarks/sampling.py)."""
    guidance: float = 1.0
    """Guidance scale w; 1 is unguided."""
    interval: tuple[float, float] = (0.1, 1.0)
    """Guidance acts for t in (low, high)."""
    order: str = "norm_first"
    """norm_first: LayerNorm both predictions, then combine. cfg_first: combine, no LayerNorm."""
    time_shift: float = 0.5
    """The time grid of euler and heun is linspace(0, 1) pushed through this shift; multistep spaces its own steps."""

    def __post_init__(self):
        require_choice("sampling.solver", self.solver, ("euler", "heun", "multistep", "dopri5"))
        require_choice("sampling.order", self.order, ("norm_first", "cfg_first"))
        require(self.steps > 0, "sampling.steps must be positive")
        require(math.isfinite(self.guidance), "sampling.guidance must be finite")
        require(self.time_shift > 0, "sampling.time_shift must be positive")
        low, high = self.interval
        require(0 <= low <= high <= 1, "sampling.interval must be LOW,HIGH with 0 <= LOW <= HIGH <= 1")

    def changed(self, **settings) -> "SamplingConfig":
        """The same but for these settings.

        Raises:
            UserError: a setting that there is not, or one out of range.
        """
        known = [field.name for field in fields(self)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise UserError(f"unknown setting sampling.{unknown[0]}; known here: {', '.join(known)}")
        return replace(self, **settings)


@dataclass
class EvaluationConfig:
    """How a run evaluates itself (when: `train.evaluate_every`, `train.evaluate_epochs`), with the guidance of
    `sampling`."""

    features: str = "auto"
    """inception (FID), pixels (small images, no weights needed) or auto."""
    inception: str = ""
    """File of Inception's weights; empty: the environment variable UNITE_FAST_INCEPTION."""
    reference: str = ""
    """A .npz with the statistics of real images; empty, with pixels: the training images."""
    count: int = 0
    """Generated images; 0: 5,000 with Inception, 1,000 with pixels. Distances of other counts are not comparable."""
    batch: int = 64
    """Images a process generates at a time."""

    def __post_init__(self):
        require_choice("evaluation.features", self.features, ("auto", "inception", "pixels"))
        require(self.count == 0 or self.count >= 2, "evaluation.count must be at least 2, or 0")
        require(self.batch > 0, "evaluation.batch must be positive")


@dataclass
class Config:
    name: str = "digits"
    """Name of the recipe and, unless train.out says otherwise, of its run folder."""
    seed: int = 0
    kernels: str = "auto"
    """Which body of the kernels runs: auto (triton on CUDA, native on a CPU), reference, native or triton."""
    attention: str = "sdpa"
    """Who computes attention: sdpa (as PyTorch chooses); on CUDA also sdpa_cudnn, sdpa_flash or sdpa_efficient, which
    are PyTorch's, or flash_attn (that package, 2 to 4)."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self):
        require(bool(self.name), "name must not be empty: the run's folder is called after it")
        require(0 <= self.seed < 2**64, "seed must be in [0, 2**64)")
        require_choice("kernels", self.kernels, backend.NAMES)
        require_choice("attention", self.attention, backend.ATTENTION_NAMES)
        require(
            not self.train.deterministic or self.attention not in NONDETERMINISTIC,
            f"train.deterministic is set, but the backward pass of attention={self.attention} is not deterministic; "
            "set attention=sdpa",
        )
