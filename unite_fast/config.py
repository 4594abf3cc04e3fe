"""All settings: typed, with defaults and a line of documentation each. `recipes.py` reads them from YAML files.

A value that cannot work raises a `UserError` that names the dotted key. This module imports nothing of the package but
`errors`, so that every other module can import it.
"""

import math
import re
from dataclasses import dataclass, field, fields, replace

from unite_fast.errors import UserError, require, require_choice, shown

KERNELS = ("auto", "reference", "native", "triton")
ATTENTION = ("sdpa", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "flash_attn", "sdpa_bfloat16", "sdpa_float32")
NONDETERMINISTIC_ATTENTION = ("sdpa_cudnn", "flash_attn")
"""Attention backends whose backward pass sums in an order that changes from run to run."""
LOADERS = ("auto", "memory", "folder", "raw", "webdataset", "dali", "source")
STRATEGIES = ("auto", "ddp", "fsdp", "hsdp")
PRECISIONS = ("bfloat16", "float32")
"""Of sampling and evaluation."""
TRAINING_PRECISIONS = (*PRECISIONS, "float8")
DEVICES = ("auto", "cpu", "cuda")
ADAMW = ("torch", "apex")
SOLVERS = ("euler", "heun", "multistep", "dopri5")
MOST_SOLVER_STEPS = 2**16
FEATURES = ("auto", "inception", "pixels")
IMAGES, MOLECULES = MODALITIES = ("images", "molecules")
LATENT_NORMS = ("layer", "layer_plain")
LINEAR, SQUARE_ROOT, NONE = BATCH_RULES = ("linear", "square_root", "none")
"""How the learning rates follow the batch size."""
MOST_STEPS = 2**53
"""Larger numbers are not exact in JSON."""

TRAINING_SAMPLES = {"inception": 5_000, "pixels": 1_000, MOLECULES: 200}
"""Generated images for an evaluation during training, by features; or generated molecules."""

VGG16_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
"""SHA-256 of torchvision's vgg16-397923af.pth."""
LPIPS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"
"""SHA-256 of vgg.pth, the linear weights v0.1, taken from the lpips 0.1.4 wheel."""
INCEPTION_SHA256 = "6726825d"
"""First digits of the SHA-256 of torch-fidelity's weights-inception-2015-12-05-6726825d.pth, from its name."""


@dataclass
class EncoderConfig:
    """The Generative Encoder. `preset: B` (M, L, XL) fills in a published size, S that of DiT-S."""

    width: int = 768
    """Channels of a token."""
    depth: int = 12
    """Transformer blocks."""
    heads: int = 12
    """Attention heads; width / heads must be even, since RoPE rotates pairs."""
    in_context_tokens: int = 32
    """Label tokens, prepended before block `in_context_start`; 0 for none."""
    in_context_start: int = 4
    """First block that sees the label tokens, counted from 0."""
    qk_norm: bool = True
    """RMSNorm on queries and keys."""

    def __post_init__(self):
        check_transformer("model.encoder", self.width, self.depth, self.heads)
        require(self.width // self.heads % 2 == 0, "model.encoder.width / heads must be even: RoPE rotates pairs")
        require(self.in_context_tokens >= 0, "model.encoder.in_context_tokens must not be negative")
        require(
            self.in_context_tokens == 0 or 0 <= self.in_context_start < self.depth,
            f"model.encoder.in_context_start must be one of the blocks 0..{self.depth - 1}",
        )


@dataclass
class DecoderConfig:
    """The pixel decoder. `preset: S` (B, L) fills in a published size."""

    width: int = 768
    """Channels of a token; a multiple of 4, for 2-D sin-cos positions."""
    depth: int = 12
    """Transformer layers."""
    heads: int = 12
    """Attention heads."""
    mlp_width: int = 3072
    """Hidden channels of each MLP."""
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
        "S": dict(width=384, depth=12, heads=6),
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
    """Sizes of the model: image or molecule, latents, encoder, decoder."""

    modality: str = IMAGES
    """images, or molecules (docs/molecules.md)."""
    image_size: int = 256
    """Side of the square images, pixels."""
    patch_size: int = 16
    """Side of a patch, pixels; it divides image_size."""
    latent_channels: int = 32
    """Channels C of a latent token."""
    latent_tokens: int = 0
    """Latent tokens N. Images: 0, for one per patch, the only number that the decoder supports. Molecules: one per
    atom; this is the largest number of atoms."""
    latent_norm: str = "layer"
    """Norm of the latents: layer, a LayerNorm, or layer_plain, one without weight and bias."""
    num_classes: int = 1000
    """Classes of the data. The class of a molecule is its number of atoms: latent_tokens + 1 classes."""
    elements: str = ""
    """Elements of the molecules, for example "H C N O F"; the order numbers them. Empty for images."""
    coordinate_scale: float = 1.4
    """Angstrom per unit of a molecule's coordinates in the network, so that they have about unit variance."""
    atom_order: bool = True
    """Learned positions by the number of an atom in its molecule. Without them the model does not see the order."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The Generative Encoder."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The pixel decoder, or the decoder of atoms."""

    def __post_init__(self):
        require_choice("model.modality", self.modality, MODALITIES)
        require_choice("model.latent_norm", self.latent_norm, LATENT_NORMS)
        require(self.latent_channels > 1, "model.latent_channels must be at least 2: LayerNorm runs over them")
        require(self.num_classes > 0, "model.num_classes must be positive")
        if self.modality == MOLECULES:
            self._check_molecules()
        else:
            self._check_images()

    def _check_molecules(self):
        require(self.latent_tokens > 0, "model.latent_tokens must be set: the largest number of atoms of a molecule")
        require(
            self.num_classes == self.latent_tokens + 1,
            f"model.num_classes is {self.num_classes}; it must be model.latent_tokens + 1 ({self.latent_tokens + 1}): "
            "the class of a molecule is its number of atoms",
        )
        symbols = self.symbols
        require(bool(symbols), 'model.elements must name the elements of the molecules, for example "H C N O F"')
        require(len(set(symbols)) == len(symbols), f"model.elements names an element twice: {shown(self.elements)}")
        require(self.coordinate_scale > 0, "model.coordinate_scale must be positive")
        require(
            self.encoder.in_context_tokens == 0,
            "model.encoder.in_context_tokens must be 0 for molecules: their size enters by adaLN alone",
        )

    def _check_images(self):
        require(self.patch_size > 0 and self.image_size > 0, "model.image_size and patch_size must be positive")
        require(
            self.image_size % self.patch_size == 0,
            f"model.image_size is {self.image_size}; it must be a multiple of model.patch_size ({self.patch_size})",
        )
        require(not self.elements, "model.elements is for molecules; set model.modality=molecules, or leave it out")
        self.latent_tokens = self.latent_tokens or self.patches
        require(
            self.latent_tokens == self.patches,
            f"model.latent_tokens is {self.latent_tokens}; it must be {self.patches}, one for each patch",
        )

    @property
    def patches(self) -> int:
        """Patches of an image; 0 for molecules."""
        if self.modality == MOLECULES:
            return 0
        return (self.image_size // self.patch_size) ** 2

    @property
    def decoder_tokens(self) -> int:
        """Tokens in the decoder: the latents, and for images a class token."""
        return self.latent_tokens + (self.modality == IMAGES)

    @property
    def token_outputs(self) -> int:
        """What the decoder makes of a token: the pixels of a patch, or an atom's logits and position."""
        return len(self.symbols) + 3 if self.modality == MOLECULES else 3 * self.patch_size**2

    @property
    def symbols(self) -> list[str]:
        """Elements of the molecules."""
        return self.elements.split()

    @property
    def sample_name(self) -> str:
        """A sample in a line for people: image or molecule. `modality` is its plural."""
        return self.modality.removesuffix("s")


@dataclass
class DataConfig:
    """Training images."""

    source: str = "digits"
    """digits (built into scikit-learn), folder (one folder per class), idx (MNIST's file format), shards (made by
    unite-fast shards), molecules (a file made by unite-fast molecules), synthetic (noise, for timing), or a kind of
    your own (docs/adding-a-dataset.md)."""
    path: str = ""
    """Folder of the data, or file of molecules; for shards also https://HOST/FOLDER, or pipe:COMMAND with {} in place
    of a file's name."""
    loader: str = "auto"
    """auto (the fastest that fits), memory, folder, raw, webdataset, dali or source; see docs/data.md."""
    flip: bool = True
    """Flip images horizontally with probability 1/2."""
    workers: int = 2
    """Processes (or threads, where nothing is decoded) that prefetch images."""

    def __post_init__(self):
        require_choice("data.loader", self.loader, LOADERS)
        require(self.workers >= 0, "data.workers must not be negative")


@dataclass
class MoleculesConfig:
    """Training on molecules (docs/molecules.md). Images ignore it."""

    heavy: int = 0
    """Train on molecules with at most this many atoms that are not hydrogen; 0: on all."""
    rotate: str = "none"
    """none, or random: rotate each molecule, uniformly over all rotations, never with a reflection."""
    permute: bool = False
    """Put the atoms of each molecule in random order."""
    batching: str = "auto"
    """groups (one forward pass for each size in the batch, no padding), padded (all molecules padded to
    model.latent_tokens atoms: one pass, static shapes) or auto: padded on CUDA or with train.compile, else groups.
    Losses and gradients are the same."""
    group: int = 32
    """Molecules of one size that follow each other in the order of an epoch, so that a batch has few sizes; 1: any
    order."""
    position_weight: float = 1.0
    """Weight of the absolute error of the positions, in Angstrom; the cross-entropy of the elements has weight 1."""

    def __post_init__(self):
        require(self.heavy >= 0, "molecules.heavy must not be negative")
        require_choice("molecules.rotate", self.rotate, ("none", "random"))
        require_choice("molecules.batching", self.batching, ("auto", "groups", "padded"))
        require(self.group > 0, "molecules.group must be positive")
        require(self.position_weight >= 0, "molecules.position_weight must not be negative")


@dataclass
class ObjectiveConfig:
    """The joint loss. The defaults are the released recipe's."""

    flow_draws: int = 3
    """F, flow draws per image: 3 in the released recipe, 14 for the published checkpoints."""
    flow_weight: float = 1.0
    """Weight of the flow loss, which sums over the F draws; the reconstruction loss has weight 1."""
    time_mean: float = 0.0
    """Mean of the normal u in s = sigmoid(u)."""
    time_std: float = 1.0
    """Standard deviation of u."""
    time_shift: float = 0.5
    """a in t = a s / (1 + (a - 1) s)."""
    tokenize_time_max: float = 0.01
    """The tokenizer pass draws its time uniformly from [0, this]."""
    decoder_noise_probability: float = 0.5
    """Probability that noise is added to an image's latents before the decoder."""
    decoder_noise_time_min: float = 0.7
    """That noise's time is uniform in [this, 1]; at 1 there is no noise."""
    label_drop: float = 0.1
    """Probability that a flow draw gets the "no class" label, for classifier-free guidance."""

    def __post_init__(self):
        require(self.flow_draws > 0, "objective.flow_draws must be positive")
        require(self.time_shift > 0, "objective.time_shift must be positive")
        require(self.time_std >= 0, "objective.time_std must not be negative")
        for name in ("decoder_noise_probability", "decoder_noise_time_min", "label_drop", "tokenize_time_max"):
            require(0 <= getattr(self, name) <= 1, f"objective.{name} must be in [0, 1]")


@dataclass
class PerceptualConfig:
    """The LPIPS part of the reconstruction loss."""

    weight: float = 0.0
    """Weight of LPIPS in the reconstruction loss; 0 switches it off, and no file is needed."""
    vgg_path: str = ""
    """torchvision's vgg16-397923af.pth; empty: the environment variable UNITE_FAST_VGG16."""
    lpips_path: str = ""
    """vgg.pth from weights/v0.1 of the lpips package; empty: the environment variable UNITE_FAST_LPIPS."""
    vgg_sha256: str = VGG16_SHA256
    """SHA-256 of the VGG16 file in hex, or its first digits (8 at least)."""
    lpips_sha256: str = LPIPS_SHA256
    """SHA-256 of the linear weights' file in hex, or its first digits (8 at least)."""
    dropout: bool = True
    """Drop half of the squared differences while training, as the released training does."""
    input_range: str = "unit"
    """unit: images enter in [0, 1], as in the released training; signed: mapped to [-1, 1], as LPIPS is defined."""

    def __post_init__(self):
        require(0 <= self.weight < math.inf, f"perceptual.weight must be a finite number, 0 or more, got {self.weight}")
        for name in ("vgg_sha256", "lpips_sha256"):
            digest = getattr(self, name)
            require(is_digest(digest), f"perceptual.{name} must be 8 to 64 hex digits, got {digest!r}")
        require_choice("perceptual.input_range", self.input_range, ("unit", "signed"))


@dataclass
class ScheduleConfig:
    """Learning rate by optimizer step: 0 -> lr, constant, cosine to lr_2, constant, cosine to lr_final, constant.

    `unit` says in what the numbers of this group are counted. They are converted to optimizer steps of
    train.batch_size when the settings are read, so that everything else, config.yaml too, has optimizer steps. In a
    recipe with `unit: 1024`, train.batch_size=8192 takes an eighth of the steps: the same number of images, and epochs.
    """

    lr: float = 1.0e-4
    """Peak learning rate, reached after warmup."""
    lr_2: float = 0.5e-4
    """Learning rate after the first cosine."""
    lr_final: float = 1.0e-5
    """Learning rate after the second cosine."""
    reference_batch: int = 384
    """The three rates hold at this batch size; at another one they follow batch_rule. 0: the same at every size."""
    batch_rule: str = LINEAR
    """How the rates scale with train.batch_size / reference_batch: linear, square_root (of it) or none."""
    unit: int = 0
    """Images in a step as counted in this group: 1024 counts steps of batch 1024, 1 counts images, and the number of
    training images counts epochs. 0: train.batch_size, so that a larger batch sees more images."""
    steps: int = 1000
    """Length of the run; train.steps, if it is set, replaces it."""
    warmup_steps: int = 0
    """Steps of linear warmup from 0."""
    hold_until: int = 0
    """Step at which the cosine to lr_2 starts."""
    decay_until: int = 0
    """Step at which it ends; 0: no cosine."""
    final_from: int = 0
    """Step at which the cosine to lr_final starts."""
    final_until: int = 0
    """Step at which it ends; 0: no second cosine, as in the released recipe."""

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
        for name in ("lr", "lr_2", "lr_final", "reference_batch", "unit"):
            require(getattr(self, name) >= 0, f"schedule.{name} must not be negative")
        require(self.steps > 0, "schedule.steps must be positive")
        require_choice("schedule.batch_rule", self.batch_rule, BATCH_RULES)

    def at_batch(self, batch_size: int) -> "ScheduleConfig":
        """The same schedule, counted in steps of `batch_size` images: each number is rounded to the nearest, and to at
        least 1 unless it is 0.

        Raises:
            UserError: a number of steps that is too large.
        """
        if self.unit in (0, batch_size):
            return replace(self, unit=self.unit and batch_size)
        counted = {}
        for name in ("steps", "warmup_steps", "hold_until", "decay_until", "final_from", "final_until"):
            number = getattr(self, name)
            steps = (2 * number * self.unit + batch_size) // (2 * batch_size)
            require(steps <= MOST_STEPS, f"schedule.{name} x schedule.unit is more than {MOST_STEPS:,} steps")
            counted[name] = max(steps, min(number, 1))
        return replace(self, unit=batch_size, **counted)


@dataclass
class OptimConfig:
    """Muon for matrices, AdamW for all other parameters, gradient clipping, EMA."""

    clip_norm: float = 3.0
    """Largest norm of the gradient over all parameters; larger gradients are scaled down to it."""
    ema_decay: float = 0.9978
    """Decay of the averaged (EMA) weights per optimizer step."""
    muon_momentum: float = 0.95
    """Momentum of Muon."""
    muon_dtype: str = "bfloat16"
    """Precision of the Newton-Schulz matmuls: bfloat16 (released) or float32."""
    adamw: str = "torch"
    """AdamW implementation: torch (fused) or apex (NVIDIA's FusedAdam, which you build yourself)."""
    adamw_betas: tuple[float, float] = (0.9, 0.999)
    """Betas of AdamW."""
    eps: float = 1e-6
    """Epsilon of both optimizers."""
    nonfinite: str = "stop"
    """On gradients that are not finite: stop ends the run and names the step; skip leaves weights, optimizers and EMA
    unchanged for that step, and 100 skipped steps in a row end the run."""

    def __post_init__(self):
        require(self.clip_norm > 0, "optim.clip_norm must be positive")
        require(0 <= self.ema_decay < 1, "optim.ema_decay must be in [0, 1)")
        require(0 <= self.muon_momentum < 1, "optim.muon_momentum must be in [0, 1)")
        require(all(0 <= beta < 1 for beta in self.adamw_betas), "optim.adamw_betas must be in [0, 1)")
        require(self.eps > 0, "optim.eps must be positive")
        require_choice("optim.muon_dtype", self.muon_dtype, PRECISIONS)
        require_choice("optim.adamw", self.adamw, ADAMW)
        require_choice("optim.nonfinite", self.nonfinite, ("stop", "skip"))
        require(
            self.nonfinite == "stop" or self.adamw == "torch",
            "optim.nonfinite is skip, but apex's optimizer cannot skip a step; set optim.adamw=torch",
        )


@dataclass
class TrainConfig:
    """Length, batch, precision, logging and checkpoints of a run."""

    steps: int = 0
    """Optimizer steps, of batch_size images each; 0: schedule.steps."""
    batch_size: int = 1024
    """Images per optimizer step, over all processes and micro-batches."""
    micro_batch: int = 0
    """Images per forward pass of one process, at most its share of the batch; 0: the whole share."""
    precision: str = "bfloat16"
    """bfloat16 (autocast), float32, or float8: bfloat16, but the Linears of encoder blocks and decoder layers multiply
    float8 numbers, except for gradients of weights (kernels/float8.py). Needs a GPU from Ada or Hopper on; on a CPU the
    rounding is emulated, which is slow. The trained model samples in bfloat16."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu or cuda."""
    threads: int = 0
    """Threads of torch on a CPU; 0: torch's choice. Tiny models gain little from two and may lose much."""
    compile: bool = True
    """Compile the transformer blocks."""
    cuda_graph: bool = False
    """Launch all kernels of a step's forward and backward passes as one CUDA graph: faster where the host is slower
    than the GPU, with few images per GPU. Takes the memory of the passes for good, and in step 5, which compares a
    replay with a usual step, a second time."""
    deterministic: bool = False
    """Give the same bits from the same seed whatever the device, at a cost: on a GPU, attention's backward pass then
    sums in a fixed order; on a CPU, attention=sdpa is not measured and stays in bfloat16."""
    log_every: int = 50
    """Steps between rows of metrics."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; 0: only by minutes. The last step always gets one."""
    checkpoint_minutes: float = 0.0
    """Minutes from one checkpoint to the next, if checkpoint_every does not come first; 0: only by steps. On many GPUs,
    where 1,000 steps take half a minute, set checkpoint_every=0."""
    keep_every: int = 0
    """Keep checkpoints at multiples of this many steps for good; 0: keep only the newest two."""
    picture_every: int = 0
    """Steps between sample and reconstruction grids; 0: only at the end."""
    evaluate_every: int = 0
    """Steps between evaluations of the EMA weights (see `evaluation`); 0: none."""
    evaluate_epochs: float = 0.0
    """The same interval in epochs, fractions allowed; set only one of the two."""
    out: str = ""
    """Run folder; empty: runs/NAME."""
    wandb: str = ""
    """Weights & Biases project to log to; empty: none."""

    def __post_init__(self):
        for name in ("batch_size", "log_every"):
            require(getattr(self, name) > 0, f"train.{name} must be positive")
        intervals = ("checkpoint_every", "keep_every", "picture_every", "evaluate_every", "evaluate_epochs")
        for name in ("steps", "micro_batch", "threads", "checkpoint_minutes", *intervals):
            require(getattr(self, name) >= 0, f"train.{name} must not be negative")
        require(
            self.checkpoint_every > 0 or self.checkpoint_minutes > 0,
            "train.checkpoint_every is 0; it must be positive, or set train.checkpoint_minutes",
        )
        require(
            self.checkpoint_every > 0 or self.keep_every == 0,
            "train.keep_every keeps checkpoints at multiples of this many steps, which checkpoints by minutes alone do "
            "not hit; set train.checkpoint_every as well",
        )
        require(
            not (self.evaluate_every and self.evaluate_epochs),
            "train.evaluate_every and train.evaluate_epochs are both set; set only one of them",
        )
        require(
            self.micro_batch == 0 or self.batch_size % self.micro_batch == 0,
            f"train.batch_size is {self.batch_size}; it must be a multiple of train.micro_batch ({self.micro_batch})",
        )
        require_choice("train.precision", self.precision, TRAINING_PRECISIONS)
        require_choice("train.device", self.device, DEVICES)

    @property
    def network_precision(self) -> str:
        """Precision of all but float8 matmuls, and of sampling: bfloat16 or float32."""
        return "bfloat16" if self.precision == "float8" else self.precision


@dataclass
class ProfileConfig:
    """A trace of some steps by torch's profiler, in the run folder."""

    steps: str = ""
    """FIRST:LAST traces steps FIRST to LAST - 1, counted from 1; empty: none."""

    def __post_init__(self):
        _ = self.traced

    @property
    def traced(self) -> range:
        """The steps to trace."""
        if not self.steps:
            return range(0)
        first, colon, last = self.steps.partition(":")
        numbers = bool(colon) and all(part.isdecimal() and len(part) < 19 for part in (first, last))
        require(numbers, f"profile.steps is {self.steps!r}; write FIRST:LAST, for example 10:13")
        require(0 < int(first) < int(last), f"profile.steps is {self.steps}; FIRST must be at least 1 and below LAST")
        return range(int(first), int(last))


@dataclass
class ParallelConfig:
    """How several processes share the training state. A single process ignores it."""

    strategy: str = "auto"
    """ddp (replicate the training state), fsdp (shard it over all processes), hsdp (shard within a machine, replicate
    across machines) or auto, which chooses by the size of the state and says why."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights between forward and backward pass: less memory, one more all-gather."""
    timeout: float = 600.0
    """Seconds without progress (a batch, a forward and backward pass, a collective) after which a process exits. Start,
    first step, checkpoints, pictures and evaluations may take ten times as long."""

    def __post_init__(self):
        require_choice("parallel.strategy", self.strategy, STRATEGIES)
        require(self.timeout > 0, "parallel.timeout must be positive")


@dataclass
class SamplingConfig:
    """How images are generated."""

    solver: str = "multistep"
    """euler, heun, multistep (second order, the cheapest) or dopri5 (adaptive, the released code's)."""
    steps: int = 24
    """Steps of the fixed-step solvers; dopri5 chooses its own. With 24, multistep matches dopri5's Frechet distance on
    the small recipes within 1 % with less than a third of the network evaluations; below 16 it is several percent off
    (docs/sampling.md)."""
    guidance: float = 1.0
    """Guidance scale w; 1 is unguided."""
    interval: tuple[float, float] = (0.1, 1.0)
    """Guidance is active for t in (low, high)."""
    order: str = "norm_first"
    """norm_first: LayerNorm both predictions, then combine. cfg_first: combine, no LayerNorm."""
    time_shift: float = 0.5
    """Shift of the time grid of euler and heun, linspace(0, 1); multistep spaces its own steps."""

    def __post_init__(self):
        require_choice("sampling.solver", self.solver, SOLVERS)
        require_choice("sampling.order", self.order, ("norm_first", "cfg_first"))
        require(self.steps > 0, "sampling.steps must be positive")
        require(self.steps <= MOST_SOLVER_STEPS, f"sampling.steps must be at most {MOST_SOLVER_STEPS:,}")
        require(math.isfinite(self.guidance), "sampling.guidance must be finite")
        require(self.time_shift > 0, "sampling.time_shift must be positive")
        low, high = self.interval
        require(0 <= low <= high <= 1, "sampling.interval must be LOW,HIGH with 0 <= LOW <= HIGH <= 1")

    def changed(self, **settings) -> "SamplingConfig":
        """A copy with these settings changed.

        Raises:
            UserError: unknown setting, or value out of range.
        """
        known = [field.name for field in fields(self)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise UserError(f"unknown setting sampling.{unknown[0]}; known here: {', '.join(known)}")
        return replace(self, **settings)


@dataclass
class EvaluationConfig:
    """How a run evaluates its EMA weights while it trains (`train.evaluate_every`, `train.evaluate_epochs`). Guidance
    and solver are those of `sampling`."""

    features: str = "auto"
    """inception (FID), pixels (small images, no weights needed) or auto."""
    inception: str = ""
    """File of Inception's weights; empty: the environment variable UNITE_FAST_INCEPTION."""
    reference: str = ""
    """An .npz with statistics of real images; empty, with pixels: the training images."""
    count: int = 0
    """Generated images or molecules; 0: 5,000 images with Inception, 1,000 with pixels, 200 molecules. Distances at
    other counts are not comparable."""
    batch: int = 64
    """Images or molecules that a process generates at a time."""

    def __post_init__(self):
        require_choice("evaluation.features", self.features, FEATURES)
        require(self.count == 0 or self.count >= 2, f"evaluation.count is {self.count}; it must be at least 2, or 0")
        require(self.batch > 0, "evaluation.batch must be positive")


@dataclass
class Config:
    """A recipe."""

    name: str = "digits"
    """Name of the recipe and, unless train.out is set, of its run folder."""
    seed: int = 0
    """Seed of initialisation, data order and every random draw."""
    kernels: str = "auto"
    """Backend of the fused ops: auto (triton on CUDA, native on a CPU), reference, native or triton."""
    attention: str = "sdpa"
    """Attention backend: sdpa (PyTorch chooses); on CUDA also PyTorch's sdpa_cudnn, sdpa_flash and sdpa_efficient, or
    flash_attn (the flash-attn package, versions 2 to 4); on a CPU also sdpa_bfloat16 and sdpa_float32. In bfloat16 on a
    CPU with bfloat16 instructions, sdpa takes the faster of these two, measured at the start of the run."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training images."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes of the model."""
    molecules: MoleculesConfig = field(default_factory=MoleculesConfig)
    """Training on molecules."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The joint loss."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """LPIPS."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizers and EMA."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The run."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Traces."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Several processes."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Generation."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluation during training."""

    def __post_init__(self):
        require(bool(self.name), "name must not be empty: it names the run folder")
        require(0 <= self.seed < 2**64, "seed must be in [0, 2**64)")
        require_choice("kernels", self.kernels, KERNELS)
        require_choice("attention", self.attention, ATTENTION)
        require(
            not self.train.deterministic or self.attention not in NONDETERMINISTIC_ATTENTION,
            f"train.deterministic is set, but the backward pass of attention={self.attention} is not deterministic; "
            "set attention=sdpa",
        )
        self.schedule = self.schedule.at_batch(self.train.batch_size)
        self.train = replace(self.train, steps=self.train.steps or self.schedule.steps)
        if self.model.modality == MOLECULES:
            self._check_molecules()

    def _check_molecules(self):
        """Settings that only images have: a run would ignore them."""
        require(self.perceptual.weight == 0, "perceptual.weight must be 0 for molecules: LPIPS compares images")
        require(
            self.objective.label_drop == 0,
            "objective.label_drop must be 0 for molecules: their class is their number of atoms, which is always known",
        )
        require(self.sampling.guidance == 1, "sampling.guidance must be 1 for molecules: their class is always given")
        require(self.sampling.order == "norm_first", "sampling.order must be norm_first for molecules: no guidance")
        require(self.train.precision != "float8", "train.precision must be bfloat16 or float32 for molecules")
        require(
            (self.evaluation.features, self.evaluation.inception, self.evaluation.reference) == ("auto", "", ""),
            "evaluation.features, evaluation.inception and evaluation.reference must be left out for molecules: they "
            "are for the Frechet distance of images",
        )
        require(
            not self.train.compile or self.molecules.batching != "groups",
            "train.compile compiles for one shape; set molecules.batching=padded, or train.compile=false",
        )


MOST_IMAGES, MOST_PER_BATCH, MOST_WORKERS, MOST_THREADS = 10**8, 2**20, 2**10, 2**12
"""Largest numbers of images to generate, of images per forward pass, of threads or processes that read images, and of
PyTorch's threads on a CPU; far above every use. Beyond, memory or time would end long before the work does."""


def check_count(name: str, count: int, least: int = 1) -> None:
    """Check a number of images.

    Raises:
        UserError: fewer than `least` or more than `MOST_IMAGES`.
    """
    require(count >= least, f"{name} is {count}; it must be at least {least}")
    require(count <= MOST_IMAGES, f"{name} is {shown(count)}; it must be at most {MOST_IMAGES:,}")


def check_seed_and_batch(seed: int, batch: int, prefix: str = "") -> None:
    """Check a seed and a batch size.

    Args:
        prefix: of the names in messages: "--" for options of a command.

    Raises:
        UserError: seed or batch size out of range.
    """
    require(0 <= seed < 2**64, f"{prefix}seed is {shown(seed)}; it must be in [0, 2**64)")
    require(batch > 0, f"{prefix}batch is {batch}; it must be positive")
    require(batch <= MOST_PER_BATCH, f"{prefix}batch is {shown(batch)}; it must be at most {MOST_PER_BATCH:,}")


def is_digest(text: str) -> bool:
    """Whether `text` is a SHA-256 in hex, or its first digits (8 at least)."""
    return re.fullmatch("[0-9a-fA-F]{8,64}", text) is not None
