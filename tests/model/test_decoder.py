"""The decoder against an independent implementation of docs/method.md."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from unite_fast.config import DecoderConfig, ModelConfig
from unite_fast.kernels import backend
from unite_fast.model.decoder import Decoder, unpatchify
from unite_fast.model.layers import sincos_2d
from unite_fast.recipes import from_tree

TABLE_ROUNDING = 1e-6
"""The model's position table is rounded to float32 (6e-8); everything else here is float64."""


def spec_forward(w: dict[str, Tensor], config: ModelConfig, z: Tensor) -> Tensor:
    """docs/method.md, "The decoder", from the weights by name."""
    size = config.decoder
    side, p = config.image_size // config.patch_size, config.patch_size

    def linear(name, value):
        return value @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(name, value):
        centred = value - value.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return centred / deviation * w[name + ".weight"] + w[name + ".bias"]

    def gelu(value):
        return value * 0.5 * (1 + torch.erf(value / math.sqrt(2)))

    x = linear("embed", linear("input_proj", z)) + sincos_2d(side, size.width)
    x = torch.cat((w["cls_token"].expand(len(z), 1, size.width), x), 1)
    for i in range(size.depth):
        name = f"layers.{i}"
        q, k, v = (
            part.unflatten(-1, (size.heads, -1)).transpose(1, 2)
            for part in linear(name + ".qkv", norm(name + ".norm1", x)).chunk(3, -1)
        )
        attended = (q @ k.mT / math.sqrt(size.width // size.heads)).softmax(-1) @ v
        x = x + linear(name + ".proj", attended.transpose(1, 2).flatten(2))
        x = x + linear(name + ".fc2", gelu(linear(name + ".fc1", norm(name + ".norm2", x))))
    patches = linear("pred", norm("norm", x))[:, 1:]
    image = z.new_zeros(len(z), 3, config.image_size, config.image_size)
    for token in range(side * side):
        top, left = token // side * p, token % side * p
        for row in range(p):
            for column in range(p):
                first = (row * p + column) * 3
                image[:, :, top + row, left + column] = patches[:, token, first : first + 3]
    return image


def latents(config: ModelConfig, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, config.latent_tokens, config.latent_channels, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("image_size", [8, 12])
def test_output_and_every_gradient_match_the_spec(image_size, tiny_config, make_model):
    config = dataclasses.replace(tiny_config.model, image_size=image_size, latent_tokens=0)
    decoder, z = make_model(config).decoder.double(), latents(config)
    names, parameters = zip(*decoder.named_parameters(), strict=True)
    ours = decoder(z)
    theirs = spec_forward(decoder.state_dict(keep_vars=True), config, z)
    assert ours.shape == (2, 3, image_size, image_size)
    torch.testing.assert_close(ours, theirs, rtol=TABLE_ROUNDING, atol=TABLE_ROUNDING)
    incoming = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    gradients = (torch.autograd.grad(out, parameters, incoming) for out in (ours, theirs))
    for name, actual, expected in zip(names, *gradients, strict=True):
        assert (actual - expected).norm() <= TABLE_ROUNDING * expected.norm(), name


def test_bias_gradients_in_bfloat16(tiny_config, make_model):
    """On the Triton backend other kernels sum them than on the C++ one; neither may be twice as far from float32."""
    config = tiny_config.model
    decoder, z = make_model(config).decoder, latents(config).float()

    def gradients(name: str, autocast: bool) -> dict[str, Tensor]:
        if missing := backend.why_missing(name):
            pytest.skip(missing)
        with backend.using(name), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            image = decoder(z)
        incoming = torch.randn(image.shape, generator=torch.Generator().manual_seed(4))
        decoder.zero_grad()
        with backend.using(name):
            image.backward(incoming.to(image.dtype))
        assert all(p.grad is not None for p in decoder.parameters())
        return {name: p.grad.clone() for name, p in decoder.named_parameters()}

    exact, native, triton = gradients("reference", False), gradients("native", True), gradients("triton", True)
    for name, expected in exact.items():
        errors = ((each[name] - expected).norm() for each in (triton, native))
        assert next(errors) <= 2 * next(errors) + 2.0**-8 * expected.norm(), name


def test_unpatchify_order_is_row_column_channel():
    """The value of each pixel encodes its token, row, column and channel."""
    side, size = 2, 4
    patches = torch.arange(side * side * size * size * 3).view(1, side * side, size * size * 3)
    image = unpatchify(patches, side, size)
    assert image.shape == (1, 3, 8, 8)
    for token, row, column, channel in ((0, 0, 0, 0), (1, 0, 0, 0), (2, 3, 1, 2), (3, 2, 3, 1)):
        value = ((token * size + row) * size + column) * 3 + channel
        assert image[0, channel, token // side * size + row, token % side * size + column] == value


def test_output_is_not_clamped(tiny_model, tiny_config):
    with torch.no_grad():
        tiny_model.decoder.pred.bias.fill_(7.0)
    assert tiny_model.decode(latents(tiny_config.model).float()).max() > 1


# Counted like the released code, which has the input projection elsewhere.
def test_parameter_count_matches_the_published_size():
    with torch.device("meta"):
        decoder = Decoder(ModelConfig(decoder=from_tree(DecoderConfig, {"preset": "B"})))
    counted = sum(p.numel() for name, p in decoder.named_parameters() if not name.startswith("input_proj"))
    assert round(counted / 1e6, 2) == 86.24


def test_initial_weights_have_the_distribution_of_pytorchs_defaults(tiny_config):
    """The bounds of nn.Linear.reset_parameters, drawn from our generator; the CLS token is zero."""
    config = dataclasses.replace(tiny_config.model, decoder=DecoderConfig(width=64, depth=1, heads=2, mlp_width=96))
    decoder = Decoder(config)
    decoder.initialize(torch.Generator().manual_seed(0))
    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.Linear):
            for value in (module.weight, module.bias):
                bound = module.in_features**-0.5
                assert 0.9 * bound < value.abs().max() <= bound, name
                assert abs(value.mean()) < 5 * bound / math.sqrt(3 * value.numel()), name
        elif isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any()
    assert not decoder.cls_token.any()


def test_autocast_is_closer_to_float64_than_a_bfloat16_model(tiny_model, tiny_config):
    decoder, z = tiny_model.decoder, latents(tiny_config.model, batch=4)
    with torch.autocast("cpu", torch.bfloat16):
        ours = decoder(z.float())
    ours.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in decoder.parameters())
    with torch.no_grad():
        truth = decoder.double()(z.float().double())
        low = decoder.bfloat16()(z.bfloat16())
    assert (ours.double() - truth).norm() <= (low.double() - truth).norm()


def test_a_layer_compiles_without_a_graph_break(tiny_model, tiny_config):
    z = latents(tiny_config.model).float()
    out = tiny_model.decode(z)
    tiny_model.decoder.layers[1].compile(fullgraph=True, backend="aot_eager")
    assert (tiny_model.decode(z) - out).norm() <= 1e-6 * out.norm()
