"""Predicted memory of training on one GPU in bytes, from the config alone. Tests compare its parts with counts.

Activations are what each op saves for backward in bfloat16 with a float32 residual, op by op as in kernels/linear.py,
norm_linear.py, attention.py and the others. `backend` is "native" or "triton"; the Triton backend saves the normalised
q and k as well as qkv, and pads SwiGLU's weights (model/layers.py).

D width, H hidden width of SwiGLU, N latent tokens, C latent channels.
"""

from dataclasses import dataclass
from math import prod
from operator import mul

from unite_fast.config import MOLECULES, Config, ModelConfig
from unite_fast.lpips import VGG_SHAPES, tap_shapes
from unite_fast.model.layers import hidden_padding, hidden_width
from unite_fast.planning.flops import (
    TIME_FEATURES,
    VGG_CONVOLUTIONS,
    decoder_layer,
    encoder_block,
    numel,
    parameter_shapes,
    tokens_per_block,
)
from unite_fast.planning.lpips import lpips_saved

FLOAT, HALF = 4, 2
"""Bytes of a float32 and of a bfloat16 number."""
MUON_BYTES, ADAMW_BYTES = FLOAT, 2 * FLOAT
"""Optimizer state per parameter: one momentum; two moments."""
RUNTIME_BYTES = 1.5e9
"""Assumed for the CUDA context, NCCL's buffers and the workspaces of cuBLAS and cuDNN."""
SLACK = 0.05
"""Assumed share lost to fragmentation in the allocator."""


def padded_hidden(width: int, backend: str) -> int:
    hidden = hidden_width(width)
    return hidden + (hidden_padding(hidden) if backend == "triton" else 0)


def encoder_activations(model: ModelConfig, with_image: bool, backend: str = "triton") -> float:
    """Bytes saved by one pass over one sample, from the noisy latents to the raw prediction."""
    size, n, c = model.encoder, model.latent_tokens, model.latent_channels
    d, hidden, heads, context = size.width, padded_hidden(size.width, backend), size.heads, size.in_context_tokens
    saved = HALF * n * c  # input_proj
    tokens = n
    if with_image and model.modality == MOLECULES:
        saved += FLOAT * (data_numbers(model) + 2 * n * d)  # the MLP of the positions
    elif with_image:
        saved += HALF * data_numbers(model)
        tokens += model.patches
    saved += (FLOAT * d + FLOAT) * (tokens + context)  # the first adaln_modulate, and that of the in-context tokens
    saved += FLOAT * (TIME_FEATURES + 3 * d) + HALF * 2 * d  # time embedding and SiLU of the condition
    saved += size.depth * HALF * (6 * d + d) + HALF * (2 * d + d)  # adaLN matmuls: outputs and inputs
    for keys, queries in tokens_per_block(model, with_image):
        saved += keys * HALF * (d + 3 * d)  # h and qkv
        if backend == "triton":
            saved += keys * (HALF * 2 * d + FLOAT * 2 * heads)  # q and k as attention reads them; 1 / RMS
        saved += queries * (HALF * d + FLOAT * heads)  # output of attention and its log-sum-exp
        saved += queries * (FLOAT * d + HALF * d + FLOAT)  # x_out and branch of gated_residual_adaln_linear
        saved += queries * HALF * 2 * hidden  # u and w of swiglu_linear
        saved += queries * (HALF * d + 2 * FLOAT)  # branch of gated_residual_norm_adaln
    return saved + HALF * n * d  # h of the final Linear


def decoder_activations(model: ModelConfig) -> float:
    """Bytes saved for one image, from the latents to the pixel difference."""
    size, n, c = model.decoder, model.latent_tokens, model.latent_channels
    d, tokens = size.width, model.decoder_tokens
    layer = 2 * (FLOAT * d + 2 * FLOAT) + HALF * (3 * d + d) + FLOAT * size.heads + HALF * size.mlp_width
    saved = HALF * n * (c + size.embed_width) + size.depth * tokens * layer
    # The last norm and Linear; that of molecules is in float32.
    saved += tokens * (FLOAT * d + 2 * FLOAT) + (FLOAT if model.modality == MOLECULES else HALF) * n * d
    return saved + FLOAT * data_numbers(model)


def data_numbers(model: ModelConfig) -> int:
    """Numbers in an image, or in the padded atoms of a molecule."""
    return 4 * model.latent_tokens if model.modality == MOLECULES else 3 * model.image_size**2


def lpips_activations(image_size: int, dropout: bool = True, backend: str = "triton") -> float:
    """Bytes that LPIPS saves for one pair of images. The native backend runs plain PyTorch: features of the
    reconstruction, and for both images what the distance at the five taps needs."""
    if backend == "triton":
        return lpips_saved(image_size)
    shapes = tap_shapes(image_size, image_size)
    taps = [prod(shape) for shape in shapes]
    saved = HALF * 3 * image_size**2 + HALF * sum(map(mul, taps, VGG_CONVOLUTIONS))
    pooled = sum(channels * (height // 2) * (width // 2) for channels, height, width in shapes[:-1])
    saved += (HALF + 8) * pooled  # pooled features and int64 indices of the maxima
    saved += sum(taps) * (2 * FLOAT + dropout)  # features and difference, dropout mask
    return saved + 2 * FLOAT * sum(height * width for _, height, width in shapes)  # norm of each pixel


def lpips_weights() -> float:
    """Bytes of VGG16 in float32 and of its bfloat16 copy within a step (kernels/casts.py)."""
    return (FLOAT + HALF) * sum(map(prod, VGG_SHAPES.values()))


@dataclass(frozen=True)
class Activations:
    """Bytes saved for backward, per image; the last two do not grow with the micro-batch."""

    tokenizer: float
    decoder: float
    lpips: float
    flow: float
    """All F draws together."""
    padding: float
    """SwiGLU's padded weights in float32, for one pass of the encoder. On several GPUs they are bfloat16: half."""
    patch_weight: float
    """Autocast's copy of the patch embedding's weight, once per micro-batch."""

    @property
    def reconstruction(self) -> float:
        return self.tokenizer + self.decoder + self.lpips

    def peak(self, images: int) -> float:
        """Bytes for a micro-batch. The reconstruction's activations are freed before the flow draws start."""
        return max(images * self.reconstruction + self.patch_weight, images * self.flow) + self.padding


def activations(config: Config, backend: str = "triton") -> Activations:
    model, draws = config.model, config.objective.flow_draws
    n, c, d = model.latent_tokens, model.latent_channels, model.encoder.width
    normed = n * (FLOAT * c + 2 * FLOAT)  # latent_norm
    per_draw = n * (HALF * c + 2 * FLOAT)  # flow_loss
    padding = 0.0
    if padded_hidden(d, backend) != hidden_width(d):
        padding = model.encoder.depth * FLOAT * 3 * d * padded_hidden(d, backend)
    perceptual = config.perceptual
    return Activations(
        tokenizer=encoder_activations(model, True, backend) + normed,
        decoder=decoder_activations(model),
        lpips=lpips_activations(model.image_size, perceptual.dropout, backend) if perceptual.weight else 0.0,
        flow=draws * (encoder_activations(model, False, backend) + per_draw) + FLOAT * n * c,
        padding=padding,
        patch_weight=HALF * d * 3 * model.patch_size**2 if model.patches else 0.0,
    )


@dataclass(frozen=True)
class State:
    """Bytes of the training state on one rank."""

    parameters: float
    gradients: float
    optimizers: float
    ema: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizers + self.ema


def training_state(model: ModelConfig, shards: int = 1) -> State:
    """Float32 training state, sharded over `shards` ranks."""
    shapes = parameter_shapes(model)
    total, muon = numel(shapes), numel([shape for shape in shapes if shape.muon])
    optimizers = MUON_BYTES * muon + ADAMW_BYTES * (total - muon)
    return State(*(size / shards for size in (FLOAT * total, FLOAT * total, optimizers, FLOAT * total)))


def float8_weights(config: Config) -> float:
    """Bytes of the weights that are kept in float8 during a step, by rows and by columns; 0 if it is off. Sharded and
    padded weights are rounded at each use instead."""
    if config.train.precision != "float8":
        return 0.0
    model = config.model
    block, layer = encoder_block(model.encoder), decoder_layer(model.decoder)
    kept = block.qkv.numel + block.proj.numel if hidden_padding(block.fc_out.inputs) else block.numel
    return 2 * (model.encoder.depth * kept + model.decoder.depth * layer.numel)


def gathered_bytes(model: ModelConfig, reshard_after_forward: bool) -> float:
    """Bytes of the bfloat16 parameters that FSDP has gathered on each GPU, and of the float32 gradients of two blocks
    in backward. FSDP gathers all parameters or, with resharding, those outside the blocks, the running block and
    the next one."""
    total = numel(parameter_shapes(model))
    block, layer = encoder_block(model.encoder).numel, decoder_layer(model.decoder).numel
    if not reshard_after_forward:
        return HALF * total + FLOAT * 2 * block
    outside = total - model.encoder.depth * block - model.decoder.depth * layer
    return HALF * (outside + 2 * max(block, layer)) + FLOAT * 2 * max(block, layer)


def backward_workspace(config: Config, images: int) -> float:
    """Bytes that live only during the backward of one block, the larger of the two passes: gradients of the residual,
    branch, h, u and w, and recomputed tensors (assumed: 12 bytes per channel and 8 per hidden channel)."""
    model = config.model
    d, hidden = model.encoder.width, padded_hidden(model.encoder.width, "triton")
    (tokenizer, _), (draw, _) = (tokens_per_block(model, with_image)[-1] for with_image in (True, False))
    block = max(tokenizer, config.objective.flow_draws * draw) * (12 * d + 8 * hidden)
    # First block of LPIPS: the gradients of two convolutions' outputs live at once.
    channels, height, width = tap_shapes(model.image_size, model.image_size)[0]
    tap = 2 * HALF * channels * height * width if config.perceptual.weight else 0
    return images * max(block, tap)
