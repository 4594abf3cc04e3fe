"""Bytes that training holds on one GPU, from the settings alone: a prediction, whose parts tests hold against counts.

Activations are those of the fast bodies in bfloat16 with a float32 residual: what each op keeps for its backward pass,
op by op as in kernels/linear.py, attention.py and the others. `body` is "native" or "triton"; the Triton body keeps
the normalised q, k and v beside qkv, and pads SwiGLU's weights (model/layers.py).

D width, H hidden width of SwiGLU, N latent tokens, C latent channels.
"""

from dataclasses import dataclass
from math import prod
from operator import mul

from unite_fast.config import Config, ModelConfig
from unite_fast.lpips import VGG_SHAPES, tap_shapes
from unite_fast.model.layers import hidden_width
from unite_fast.planning.flops import TIME_FEATURES, VGG_CONVOLUTIONS, Matrix, parameter_shapes, wanted_tokens

FLOAT, HALF = 4, 2
"""Bytes of a float32 and of a bfloat16 number."""
MUON_BYTES, ADAMW_BYTES = FLOAT, 2 * FLOAT
"""What an optimizer holds of a number: the momentum; two moments."""
RUNTIME_BYTES = 1.5e9
"""Assumed for CUDA's context, the buffers of NCCL and the workspaces of cuBLAS and cuDNN."""
SLACK = 0.05
"""Assumed share that the allocator cannot use."""


def padded_hidden(width: int, body: str) -> int:
    hidden = hidden_width(width)
    return hidden + (-hidden % 64 if body == "triton" else 0)


def encoder_activations(model: ModelConfig, with_image: bool, body: str = "triton") -> float:
    """Bytes that one pass over one sample keeps, from the noisy latents to the raw prediction."""
    size, n, c = model.encoder, model.latent_tokens, model.latent_channels
    d, hidden, heads, context = size.width, padded_hidden(size.width, body), size.heads, size.in_context_tokens
    kept = HALF * n * c  # input_proj
    entering = n
    if with_image:
        kept += HALF * 3 * model.image_size**2
        entering += model.patches
    kept += (FLOAT * d + FLOAT) * (entering + context)  # the first adaln_modulate, and that of the in-context tokens
    kept += FLOAT * (TIME_FEATURES + 3 * d) + HALF * 2 * d  # time embedding and SiLU of the condition
    kept += size.depth * HALF * (6 * d + d) + HALF * (2 * d + d)  # adaLN products and their inputs
    for tokens, wanted in wanted_tokens(model, with_image):
        kept += tokens * HALF * (d + 3 * d)  # h and qkv
        if body == "triton":
            kept += tokens * (HALF * 3 * d + FLOAT * 2 * heads)  # q, k, v as attention reads them; inverse RMS
        kept += wanted * (HALF * d + FLOAT * heads)  # attended values, and their log-sums
        kept += wanted * (FLOAT * d + HALF * d + FLOAT)  # x_out and branch of gated_residual_adaln_linear
        kept += wanted * HALF * 2 * hidden  # u and w of swiglu_linear
        kept += wanted * (HALF * d + 2 * FLOAT)  # branch of gated_residual_norm_adaln
    return kept + HALF * n * d  # h of the final Linear


def decoder_activations(model: ModelConfig) -> float:
    """Bytes kept from the latents to the difference of the pixels, one image."""
    size, n, c = model.decoder, model.latent_tokens, model.latent_channels
    d, tokens = size.width, model.latent_tokens + 1
    layer = 2 * (FLOAT * d + 2 * FLOAT) + HALF * (3 * d + d) + FLOAT * size.heads + HALF * size.mlp_width
    kept = HALF * n * (c + size.embed_width) + size.depth * tokens * layer
    kept += tokens * (FLOAT * d + 2 * FLOAT) + HALF * n * d  # the last norm and Linear
    return kept + FLOAT * 3 * model.image_size**2


def lpips_activations(image_size: int, dropout: bool = True, body: str = "triton") -> float:
    """Bytes that LPIPS keeps of one pair of images: of the reconstruction its features, of both what the distance at
    the five taps needs. The Triton body makes that again from the features."""
    shapes = tap_shapes(image_size, image_size)
    taps = [prod(shape) for shape in shapes]
    kept = HALF * 3 * image_size**2 + HALF * sum(map(mul, taps, VGG_CONVOLUTIONS))
    pooled = sum(channels * (height // 2) * (width // 2) for channels, height, width in shapes[:-1])
    kept += (HALF + 8) * pooled  # the pooled features, and where each came from
    if body == "triton":
        return kept + sum(taps) * (HALF + dropout)  # the image's features, dropout mask
    kept += sum(taps) * (2 * FLOAT + dropout)  # features and difference, dropout mask
    return kept + 2 * FLOAT * sum(height * width for _, height, width in shapes)  # each pixel's norm


def lpips_weights() -> float:
    """VGG16 in float32 and the bfloat16 copy of a step (kernels/casts.py)."""
    return (FLOAT + HALF) * sum(map(prod, VGG_SHAPES.values()))


@dataclass(frozen=True)
class Activations:
    """Bytes kept for the backward pass, an image; the last two do not grow with the micro-batch."""

    tokenizer: float
    decoder: float
    lpips: float
    flow: float
    """Of all F draws."""
    padding: float
    """SwiGLU's padded weights in float32, of one pass of the encoder, whatever the micro-batch; where several GPUs
    train they are bfloat16, half of this."""
    patch_weight: float
    """The patch embedding's weight as autocast casts it, once a micro-batch."""

    @property
    def reconstruction(self) -> float:
        return self.tokenizer + self.decoder + self.lpips

    def peak(self, images: int) -> float:
        """Of a micro-batch, as training takes it: the reconstruction's are freed before the flow draws begin."""
        return max(images * self.reconstruction + self.patch_weight, images * self.flow) + self.padding


def activations(config: Config, body: str = "triton") -> Activations:
    """Bytes an image."""
    model, draws = config.model, config.objective.flow_draws
    n, c, d = model.latent_tokens, model.latent_channels, model.encoder.width
    normed = n * (FLOAT * c + 2 * FLOAT)  # latent_norm
    per_draw = n * (HALF * c + 2 * FLOAT)  # flow_loss
    padding = 0.0
    if padded_hidden(d, body) != hidden_width(d):
        padding = model.encoder.depth * FLOAT * 3 * d * padded_hidden(d, body)
    return Activations(
        tokenizer=encoder_activations(model, True, body) + normed,
        decoder=decoder_activations(model),
        lpips=lpips_activations(model.image_size, config.perceptual.dropout, body) if config.perceptual.weight else 0.0,
        flow=draws * (encoder_activations(model, False, body) + per_draw) + FLOAT * n * c,
        padding=padding,
        patch_weight=HALF * d * 3 * model.patch_size**2,
    )


@dataclass(frozen=True)
class State:
    """Bytes of the training state of one process."""

    parameters: float
    gradients: float
    optimizers: float
    ema: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizers + self.ema


def numbers(shapes: list[Matrix]) -> int:
    return sum(shape.numbers for shape in shapes)


def training_state(model: ModelConfig, shards: int = 1) -> State:
    """All of it in float32, divided among `shards` processes."""
    shapes = parameter_shapes(model)
    every, muon = numbers(shapes), numbers([shape for shape in shapes if shape.muon])
    optimizers = MUON_BYTES * muon + ADAMW_BYTES * (every - muon)
    return State(*(size / shards for size in (FLOAT * every, FLOAT * every, optimizers, FLOAT * every)))


def block_numbers(model: ModelConfig) -> int:
    """Parameters of one encoder block without its adaLN Linear, which the encoder runs for all blocks at once."""
    d, hidden = model.encoder.width, hidden_width(model.encoder.width)
    return 4 * d * d + 3 * hidden * d


def gathered(model: ModelConfig, reshard_after_forward: bool) -> float:
    """Bytes of bfloat16 parameters that FSDP has whole on each GPU: all of them, or what lies outside the blocks, the
    block that runs and the next one, with the float32 gradients of the two that go back."""
    every = sum(shape.numbers for shape in parameter_shapes(model))
    block = block_numbers(model)
    if not reshard_after_forward:
        return HALF * every + FLOAT * 2 * block
    d, layers = model.decoder.width, model.decoder.depth
    decoder_layer = 4 * d * d + 2 * d * model.decoder.mlp_width
    outside = every - model.encoder.depth * block - layers * decoder_layer
    return HALF * (outside + 2 * max(block, decoder_layer)) + FLOAT * 2 * max(block, decoder_layer)


def backward_workspace(config: Config, images: int) -> float:
    """Bytes of what lives only while one block goes back, the larger of the two passes: gradients of residual, branch
    and h, of u and w, and what is made again (assumed: 12 bytes a channel and 8 a hidden channel)."""
    model = config.model
    d, hidden = model.encoder.width, padded_hidden(model.encoder.width, "triton")
    longest = max(wanted_tokens(model, True)[-1][0], config.objective.flow_draws * wanted_tokens(model, False)[-1][0])
    block = longest * (12 * d + 8 * hidden)
    # The first tap of LPIPS: gradients of its features and of both convolutions' outputs live at once.
    channels, height, width = tap_shapes(model.image_size, model.image_size)[0]
    tap = 3 * HALF * channels * height * width if config.perceptual.weight else 0
    return images * max(block, tap)
