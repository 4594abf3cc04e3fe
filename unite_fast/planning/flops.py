"""FLOPs of a training image and numbers of parameters, from the settings alone.

A product [m, k] x [k, n] is 2 m k n FLOPs. Counted are matrix products, convolutions and attention, forward and
backward; elementwise work is not, nor is anything that a backward pass makes again (Chowdhery et al., arXiv 2204.02311,
appendix B: model FLOPs, the numerator of MFU). The backward pass of a product takes two of its size, or one where its
input needs no gradient. Attention of Q queries over T keys is two products of 2 Q T D forward and four backward.

D width of a transformer, H hidden width, N latent tokens, P patches, C latent channels.
"""

from math import prod
from typing import NamedTuple

from unite_fast.config import Config, DecoderConfig, EncoderConfig, ModelConfig
from unite_fast.lpips import VGG_SHAPES
from unite_fast.model.layers import hidden_width
from unite_fast.optim.muon import newton_schulz_flops

TIME_FEATURES = 512
"""Of the time embedding: sines and cosines of 256 frequencies."""
VGG_CONVOLUTIONS = (2, 2, 3, 3, 3)
"""Convolutions of VGG16 before each of the five taps; a pooling between two taps halves the sides."""


class Flops(NamedTuple):
    """Of a forward pass and of its backward pass."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)


def product(rows: int, inputs: int, outputs: int, from_data: bool = False) -> Flops:
    """A Linear; `from_data`: its input needs no gradient."""
    forward = 2 * rows * inputs * outputs
    return Flops(forward, forward if from_data else 2 * forward)


def attention(queries: int, keys: int, width: int) -> Flops:
    forward = 4 * queries * keys * width
    return Flops(forward, 2 * forward)


def sequence_lengths(size: EncoderConfig, tokens: int) -> list[int]:
    """Tokens in each block of a pass over `tokens` latents and patches."""
    context, start = size.in_context_tokens, size.in_context_start
    return [tokens + (context if i >= start else 0) for i in range(size.depth)]


def wanted_tokens(model: ModelConfig, with_image: bool, skip_unread: bool = True) -> list[tuple[int, int]]:
    """(tokens, tokens that are computed past the attention) of each block of an encoder pass. Of the last block only
    the latents are read; the released code computes them all."""
    lengths = sequence_lengths(model.encoder, model.latent_tokens + (model.patches if with_image else 0))
    last = model.latent_tokens if skip_unread else lengths[-1]
    return [*((length, length) for length in lengths[:-1]), (lengths[-1], last)]


def encoder_flops(model: ModelConfig, with_image: bool, skip_unread: bool = True) -> Flops:
    """One pass of the Generative Encoder over one sample: tokenizer (with the image) or one flow draw (without)."""
    width, hidden, n = model.encoder.width, hidden_width(model.encoder.width), model.latent_tokens
    found = product(n, model.latent_channels, width, from_data=True)
    if with_image:
        found += product(model.patches, 3 * model.patch_size**2, width, from_data=True)
    found += product(1, TIME_FEATURES, width, from_data=True) + product(1, width, width)
    for tokens, wanted in wanted_tokens(model, with_image, skip_unread):
        found += product(1, width, 6 * width) + product(tokens, width, 3 * width)
        found += attention(wanted, tokens, width) + product(wanted, width, width)
        found += product(wanted, width, 2 * hidden) + product(wanted, hidden, width)
    return found + product(1, width, 2 * width) + product(n, width, model.latent_channels)


def decoder_flops(model: ModelConfig) -> Flops:
    size, n = model.decoder, model.latent_tokens
    found = product(n, model.latent_channels, size.embed_width) + product(n, size.embed_width, size.width)
    tokens = n + 1
    for _ in range(size.depth):
        found += product(tokens, size.width, 3 * size.width) + attention(tokens, tokens, size.width)
        found += product(tokens, size.width, size.width)
        found += product(tokens, size.width, size.mlp_width) + product(tokens, size.mlp_width, size.width)
    return found + product(n, size.width, 3 * model.patch_size**2)


def lpips_flops(image_size: int) -> Flops:
    """Image and reconstruction forward, and back to the reconstruction; VGG16 itself is frozen."""
    convolutions = [shape for shape in VGG_SHAPES.values() if len(shape) == 4]
    levels = [level for level, count in enumerate(VGG_CONVOLUTIONS) for _ in range(count)]
    once = 0
    for level, (outputs, inputs, height, width) in zip(levels, convolutions, strict=True):
        once += 2 * (image_size >> level) ** 2 * outputs * inputs * height * width
    return Flops(2 * once, once)


def parts(config: Config, skip_unread: bool = True) -> dict[str, Flops]:
    """FLOPs of one training image by part: "tokenizer", "flow" (all F draws together), "decoder" and "lpips".

    Args:
        skip_unread: as this model computes; False: as the released code does, all tokens of the last block.
    """
    model, draws = config.model, config.objective.flow_draws
    draw = encoder_flops(model, with_image=False, skip_unread=skip_unread)
    return {
        "tokenizer": encoder_flops(model, with_image=True, skip_unread=skip_unread),
        "flow": Flops(draws * draw.forward, draws * draw.backward),
        "decoder": decoder_flops(model),
        "lpips": lpips_flops(model.image_size) if config.perceptual.weight else Flops(0, 0),
    }


def image_flops(config: Config, skip_unread: bool = True) -> float:
    """FLOPs of one training image, forward and backward."""
    return sum(part.total for part in parts(config, skip_unread).values())


class Matrix(NamedTuple):
    """`count` parameters of one shape; `muon`: whose optimizer is Muon (see optim/groups.py)."""

    part: str
    count: int
    shape: tuple[int, ...]
    muon: bool

    @property
    def numbers(self) -> int:
        return self.count * prod(self.shape)


def parameter_shapes(model: ModelConfig) -> list[Matrix]:
    """Every trainable parameter by part ("encoder", "norm", "decoder") and shape."""
    return [*_encoder_shapes(model), Matrix("norm", 2, (model.latent_channels,), False), *_decoder_shapes(model)]


def _encoder_shapes(model: ModelConfig) -> list[Matrix]:
    size, channels = model.encoder, model.latent_channels
    width, hidden, depth = size.width, hidden_width(size.width), size.depth

    def linear(inputs: int, outputs: int, count: int = 1, muon: bool = True) -> list[Matrix]:
        return [Matrix("encoder", count, (outputs, inputs), muon), Matrix("encoder", count, (outputs,), False)]

    found = [
        *linear(channels, width),
        *linear(TIME_FEATURES, width),
        *linear(width, width),
        *linear(width, 6 * width, depth),
        *linear(width, 3 * width, depth),
        *linear(width, width, depth),
        *linear(width, 2 * hidden, depth),
        *linear(hidden, width, depth),
        *linear(width, 2 * width, muon=False),
        *linear(width, channels, muon=False),
        Matrix("encoder", 1, (model.num_classes + 2, width), True),
        Matrix("encoder", 1, (1, model.latent_tokens, width), False),
        Matrix("encoder", 1, (width, 3, model.patch_size, model.patch_size), False),
        Matrix("encoder", 1, (width,), False),
        Matrix("encoder", 3 * depth + 1, (width,), False),
    ]
    if size.in_context_tokens:
        found.append(Matrix("encoder", 1, (1, size.in_context_tokens, width), False))
    if size.qk_norm:
        found.append(Matrix("encoder", 2 * depth, (width // size.heads,), False))
    return found


def _decoder_shapes(model: ModelConfig) -> list[Matrix]:
    size: DecoderConfig = model.decoder
    width, depth = size.width, size.depth
    linears = [
        (model.latent_channels, size.embed_width, 1),
        (size.embed_width, width, 1),
        (width, 3 * width, depth),
        (width, width, depth),
        (width, size.mlp_width, depth),
        (size.mlp_width, width, depth),
        (width, 3 * model.patch_size**2, 1),
    ]
    found = [Matrix("decoder", 1, (width,), False), Matrix("decoder", 4 * depth + 2, (width,), False)]
    for inputs, outputs, count in linears:
        found += [Matrix("decoder", count, (outputs, inputs), True), Matrix("decoder", count, (outputs,), False)]
    return found


def parameters(model: ModelConfig) -> dict[str, int]:
    """Trainable numbers by part: "encoder", "norm" and "decoder"."""
    found = {"encoder": 0, "norm": 0, "decoder": 0}
    for matrix in parameter_shapes(model):
        found[matrix.part] += matrix.numbers
    return found


def newton_schulz(model: ModelConfig) -> float:
    """FLOPs of Muon's products for all its matrices, once an optimizer step."""
    return sum(one.count * newton_schulz_flops(one.shape) for one in parameter_shapes(model) if one.muon)
