"""FLOPs of a training image and parameter counts, from the config alone.

A matmul [m, k] x [k, n] is 2 m k n FLOPs. Counted: matmuls, convolutions and attention, forward and backward. Not
counted: elementwise work and anything recomputed in backward (Chowdhery et al., arXiv 2204.02311, appendix B: model
FLOPs, the numerator of MFU). The backward pass of a matmul has two matmuls of its size, or one if its input needs no
gradient. Attention of Q queries over T keys is two matmuls of 2 Q T D forward and four backward.

D width of a transformer, H hidden width, N latent tokens, P patches, C latent channels.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from unite_fast.config import IMAGES, MOLECULES, Config, DecoderConfig, EncoderConfig, ModelConfig
from unite_fast.lpips import VGG_BLOCKS, VGG_SHAPES
from unite_fast.model.layers import hidden_width
from unite_fast.optim.muon import newton_schulz_flops

TIME_FEATURES = 512
"""Inputs of the time embedding: sines and cosines of 256 frequencies."""
VGG_CONVOLUTIONS = tuple(map(len, VGG_BLOCKS))
"""Convolutions of VGG16 before each of the five taps; pooling between two taps halves the sides."""


@dataclass(frozen=True)
class Flops:
    forward: float = 0
    backward: float = 0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)


def matmul(rows: int, inputs: int, outputs: int, input_needs_grad: bool = True) -> Flops:
    """A Linear [inputs -> outputs] applied to `rows` tokens."""
    forward = 2 * rows * inputs * outputs
    return Flops(forward, 2 * forward if input_needs_grad else forward)


def attention(queries: int, keys: int, width: int) -> Flops:
    forward = 4 * queries * keys * width
    return Flops(forward, 2 * forward)


class Linear(NamedTuple):
    inputs: int
    outputs: int

    @property
    def numel(self) -> int:
        """Weights, without the bias."""
        return self.inputs * self.outputs


class BlockLinears(NamedTuple):
    """Linears of a transformer block. The adaLN Linears of the encoder are not among them: they run once for all
    blocks."""

    qkv: Linear
    proj: Linear
    fc_in: Linear
    fc_out: Linear

    @property
    def numel(self) -> int:
        return sum(linear.numel for linear in self)


def encoder_block(size: EncoderConfig) -> BlockLinears:
    """`fc_in` computes both inputs of SwiGLU."""
    width, hidden = size.width, hidden_width(size.width)
    return BlockLinears(
        Linear(width, 3 * width), Linear(width, width), Linear(width, 2 * hidden), Linear(hidden, width)
    )


def decoder_layer(size: DecoderConfig) -> BlockLinears:
    d, hidden = size.width, size.mlp_width
    return BlockLinears(Linear(d, 3 * d), Linear(d, d), Linear(d, hidden), Linear(hidden, d))


def sequence_lengths(size: EncoderConfig, tokens: int) -> list[int]:
    """Tokens in each block of a pass over `tokens` latents and patches."""
    context, start = size.in_context_tokens, size.in_context_start
    return [tokens + (context if i >= start else 0) for i in range(size.depth)]


def tokens_per_block(model: ModelConfig, with_image: bool, skip_unread: bool = True) -> list[tuple[int, int]]:
    """(keys, queries) of each block of an encoder pass: tokens that attention reads, and tokens that it writes and the
    rest of the block computes. They differ in the last block, whose patches and context nothing reads; the released
    code computes them anyway (`skip_unread` False)."""
    lengths = sequence_lengths(model.encoder, model.latent_tokens + (model.patches if with_image else 0))
    last = model.latent_tokens if skip_unread else lengths[-1]
    return [*((length, length) for length in lengths[:-1]), (lengths[-1], last)]


def encoder_flops(model: ModelConfig, with_image: bool, skip_unread: bool = True) -> Flops:
    """One pass of the Generative Encoder over one sample: the tokenizer (with the image) or one flow draw (without)."""
    width, n, block = model.encoder.width, model.latent_tokens, encoder_block(model.encoder)
    total = matmul(n, model.latent_channels, width, input_needs_grad=False)
    if with_image and model.modality == MOLECULES:
        total += matmul(n, 3, width, input_needs_grad=False) + matmul(n, width, width)
    elif with_image:
        total += matmul(model.patches, model.token_outputs, width, input_needs_grad=False)
    total += matmul(1, TIME_FEATURES, width, input_needs_grad=False) + matmul(1, width, width)
    for keys, queries in tokens_per_block(model, with_image, skip_unread):
        total += matmul(1, width, 6 * width) + matmul(keys, *block.qkv) + attention(queries, keys, width)
        total += matmul(queries, *block.proj) + matmul(queries, *block.fc_in) + matmul(queries, *block.fc_out)
    return total + matmul(1, width, 2 * width) + matmul(n, width, model.latent_channels)


def decoder_flops(model: ModelConfig) -> Flops:
    size, n = model.decoder, model.latent_tokens
    total = matmul(n, model.latent_channels, size.embed_width) + matmul(n, size.embed_width, size.width)
    tokens = model.decoder_tokens
    for _ in range(size.depth):
        total += attention(tokens, tokens, size.width)
        for linear in decoder_layer(size):
            total += matmul(tokens, *linear)
    return total + matmul(n, size.width, model.token_outputs)


def all_attention(config: Config) -> Flops:
    """The part of attention in one training image's FLOPs."""
    model, total = config.model, Flops()
    for with_image, passes in ((True, 1), (False, config.objective.flow_draws)):
        for keys, queries in tokens_per_block(model, with_image):
            each = attention(queries, keys, model.encoder.width)
            total += Flops(passes * each.forward, passes * each.backward)
    tokens, size = model.decoder_tokens, model.decoder
    each = attention(tokens, tokens, size.width)
    return total + Flops(size.depth * each.forward, size.depth * each.backward)


def wide_linears(config: Config) -> list[tuple[int, Linear]]:
    """The Linears of encoder blocks and decoder layers, each with the tokens of one training image that it reads."""
    model, result = config.model, []
    block, size = encoder_block(model.encoder), model.decoder
    for with_image, passes in ((True, 1), (False, config.objective.flow_draws)):
        for keys, queries in tokens_per_block(model, with_image):
            result += [(passes * (keys if one is block.qkv else queries), one) for one in block]
    return result + [(size.depth * model.decoder_tokens, one) for one in decoder_layer(size)]


def float8_flops(config: Config) -> float:
    """FLOPs of one training image that run in float8: outputs and input gradients of `wide_linears`; 0 if off."""
    if config.train.precision != "float8":
        return 0.0
    return sum(2 * matmul(tokens, *linear).forward for tokens, linear in wide_linears(config))


def lpips_flops(image_size: int) -> Flops:
    """Forward for image and reconstruction, backward to the reconstruction only; VGG16 is frozen."""
    convolutions = [shape for shape in VGG_SHAPES.values() if len(shape) == 4]
    levels = [level for level, count in enumerate(VGG_CONVOLUTIONS) for _ in range(count)]
    once = 0
    for level, (outputs, inputs, height, width) in zip(levels, convolutions, strict=True):
        once += 2 * (image_size >> level) ** 2 * outputs * inputs * height * width
    return Flops(2 * once, once)


def parts(config: Config, skip_unread: bool = True) -> dict[str, Flops]:
    """FLOPs of one training image by part: "tokenizer", "flow" (all F draws together), "decoder" and "lpips".

    Args:
        skip_unread: True: as this model computes; False: as the released code does, all tokens of the last block.
    """
    model, draws = config.model, config.objective.flow_draws
    draw = encoder_flops(model, with_image=False, skip_unread=skip_unread)
    return {
        "tokenizer": encoder_flops(model, with_image=True, skip_unread=skip_unread),
        "flow": Flops(draws * draw.forward, draws * draw.backward),
        "decoder": decoder_flops(model),
        "lpips": lpips_flops(model.image_size) if config.perceptual.weight else Flops(),
    }


def image_flops(config: Config, skip_unread: bool = True) -> float:
    """FLOPs of one training image, forward and backward."""
    return sum(part.total for part in parts(config, skip_unread).values())


class ParameterShape(NamedTuple):
    """`count` parameters of one shape; `muon`: whether Muon trains them (see optim/param_groups.py)."""

    part: str
    count: int
    shape: tuple[int, ...]
    muon: bool

    @property
    def numel(self) -> int:
        return self.count * prod(self.shape)


def parameter_shapes(model: ModelConfig) -> list[ParameterShape]:
    """Shapes of all trainable parameters, by part ("encoder", "norm", "decoder")."""
    norm = [] if model.latent_norm == "layer_plain" else [ParameterShape("norm", 2, (model.latent_channels,), False)]
    return [*_encoder_shapes(model), *norm, *_decoder_shapes(model)]


def _encoder_shapes(model: ModelConfig) -> list[ParameterShape]:
    size, channels = model.encoder, model.latent_channels
    width, depth = size.width, size.depth

    def tensor(shape: tuple[int, ...], count: int = 1, muon: bool = False) -> ParameterShape:
        return ParameterShape("encoder", count, shape, muon)

    def linear(inputs: int, outputs: int, count: int = 1, muon: bool = True) -> list[ParameterShape]:
        return [tensor((outputs, inputs), count, muon), tensor((outputs,), count)]

    shapes = [
        *linear(channels, width),
        *linear(TIME_FEATURES, width),
        *linear(width, width),
        *linear(width, 6 * width, depth),
        *(shape for matrix in encoder_block(size) for shape in linear(*matrix, depth)),
        *linear(width, 2 * width, muon=False),
        *linear(width, channels, muon=False),
        tensor((model.num_classes + 2, width), muon=True),
        tensor((width,), 3 * depth + 1),
    ]
    if model.modality == MOLECULES:
        shapes += [*linear(3, width, muon=False), *linear(width, width, muon=False), tensor((width,))]
        shapes += [tensor((len(model.symbols), width)), *[tensor((1, model.latent_tokens, width))] * model.atom_order]
    else:
        shapes += [tensor((1, model.latent_tokens, width)), tensor((width,))]
        shapes.append(tensor((width, 3, model.patch_size, model.patch_size)))
    if size.in_context_tokens:
        shapes.append(tensor((1, size.in_context_tokens, width)))
    if size.qk_norm:
        shapes.append(tensor((width // size.heads,), 2 * depth))
    return shapes


def _decoder_shapes(model: ModelConfig) -> list[ParameterShape]:
    size = model.decoder
    width, depth = size.width, size.depth
    linears = [
        (Linear(model.latent_channels, size.embed_width), 1),
        (Linear(size.embed_width, width), 1),
        *((linear, depth) for linear in decoder_layer(size)),
        (Linear(width, model.token_outputs), 1),
    ]
    shapes = [ParameterShape("decoder", 4 * depth + 2, (width,), False)]
    if model.modality == IMAGES:
        shapes.append(ParameterShape("decoder", 1, (width,), False))
    elif model.atom_order:
        shapes.append(ParameterShape("decoder", 1, (1, model.latent_tokens, width), False))
    for (inputs, outputs), count in linears:
        shapes.append(ParameterShape("decoder", count, (outputs, inputs), True))
        shapes.append(ParameterShape("decoder", count, (outputs,), False))
    return shapes


def numel(shapes: list[ParameterShape]) -> int:
    """Number of parameters."""
    return sum(shape.numel for shape in shapes)


def parameters(model: ModelConfig) -> dict[str, int]:
    """Number of trainable parameters by part: "encoder", "norm" and "decoder"."""
    shapes = parameter_shapes(model)
    return {part: numel([shape for shape in shapes if shape.part == part]) for part in ("encoder", "norm", "decoder")}


def newton_schulz(model: ModelConfig) -> float:
    """FLOPs of Newton-Schulz for all of Muon's matrices, once per optimizer step."""
    return sum(one.count * newton_schulz_flops(one.shape) for one in parameter_shapes(model) if one.muon)
