"""The Generative Encoder against an independent implementation of docs/method.md, without shortcuts."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from unite_fast.config import EncoderConfig, ModelConfig
from unite_fast.model.generative_encoder import GenerativeEncoder, matmul_dtype
from unite_fast.model.layers import sincos_1d
from unite_fast.recipes import from_tree

TABLE_ROUNDING = 1e-6
"""The model's rotary table is rounded to float32 (6e-8); everything else here is float64."""


def spec_forward(w: dict[str, Tensor], config: ModelConfig, x, t, labels, data=None) -> Tensor:
    """docs/method.md, "The Generative Encoder", from the weights by name. Every block computes every token."""
    size, n = config.encoder, config.latent_tokens

    def linear(name, value):
        return value @ w[name + ".weight"].T + w[name + ".bias"]

    def silu(value):
        return value / (1 + torch.exp(-value))

    def rms(name, value):
        return value / torch.sqrt((value**2).mean(-1, keepdim=True) + 1e-6) * w[name + ".weight"]

    def attention(name, h, positions):
        heads, k = size.heads, size.width // size.heads
        q, key, v = (part.unflatten(-1, (heads, k)).transpose(1, 2) for part in linear(name + ".qkv", h).chunk(3, -1))
        if size.qk_norm:
            q, key = rms(name + ".q_norm", q), rms(name + ".k_norm", key)
        # None: a token without rotation.
        angles = torch.tensor([[(p or 0) * 10000 ** (-2 * i / k) for i in range(k // 2)] for p in positions])
        rotation = torch.exp(1j * angles.double())

        def rotate(value):
            pairs = torch.complex(value[..., 0::2], value[..., 1::2]) * rotation
            return torch.stack((pairs.real, pairs.imag), -1).flatten(-2)

        scores = rotate(q) @ rotate(key).mT / math.sqrt(k)
        return linear(name + ".proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    h = linear("input_proj", x) + w["latent_tokens"]
    if data is not None:
        p = config.patch_size
        tokens = []
        for row in range(0, config.image_size, p):
            for column in range(0, config.image_size, p):
                patch = data[:, :, row : row + p, column : column + p]
                tokens.append(torch.einsum("bcij,dcij->bd", patch, w["patch_embed.weight"]) + w["patch_embed.bias"])
        h = torch.cat((h, torch.stack(tokens, 1)), 1)
    positions: list[int | None] = list(range(h.shape[1]))

    angle = 2 * math.pi * t[:, None] * w["time_embed.frequencies"]
    features = torch.cat((angle.sin(), angle.cos()), -1)
    label = w["label_embed.weight"][labels]
    c = linear("time_embed.fc2", silu(linear("time_embed.fc1", features))) + label

    for i in range(size.depth):
        if size.in_context_tokens and i == size.in_context_start:
            h = torch.cat((label[:, None] + w["in_context_posemb"], h), 1)
            positions = [None] * size.in_context_tokens + positions
        name = f"blocks.{i}"
        parts = linear(f"modulation.{i}", silu(c))[:, None].chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        h = h + gate1 * attention(name + ".attn", rms(f"norm1.{i}", h) * (1 + scale1) + shift1, positions)
        u, v = linear(name + ".mlp.fc_in", rms(name + ".norm2", h) * (1 + scale2) + shift2).chunk(2, -1)
        h = h + gate2 * linear(name + ".mlp.fc_out", silu(u) * v)
        h = rms(name + ".norm3", h)
    h = h[:, positions.index(0) :][:, :n]
    shift, scale = linear("final_layer.modulation", silu(c))[:, None].chunk(2, -1)
    return linear("final_layer.linear", rms("final_layer.norm", h) * (1 + scale) + shift)


def arguments(config: ModelConfig, batch: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    side = config.image_size
    return {
        "x": torch.randn(batch, config.latent_tokens, config.latent_channels, generator=generator, dtype=dtype),
        "t": torch.rand(batch, generator=generator, dtype=dtype),
        "labels": torch.randint(config.num_classes + 1, (batch,), generator=generator),
        "data": torch.rand(batch, 3, side, side, generator=generator, dtype=dtype),
    }


def with_encoder(config: ModelConfig, **changes) -> ModelConfig:
    return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, **changes))


@pytest.mark.parametrize("encode", [True, False], ids=["encode", "denoise"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"in_context_start": 0},
        {"in_context_start": 2},  # the last block: shifts the slice of output tokens
        {"in_context_tokens": 0},
        {"qk_norm": False},
        {"depth": 1, "in_context_start": 0},
    ],
    ids=str,
)
def test_output_and_every_gradient_match_the_spec(changes, encode, tiny_config, make_model):
    """Also shows that the tokens skipped by the last block do not affect the result."""
    config = with_encoder(tiny_config.model, **changes)
    encoder = make_model(config).encoder.double()
    inputs = arguments(config)
    if not encode:
        del inputs["data"]
    names, parameters = zip(*encoder.named_parameters(), strict=True)

    ours = encoder(**inputs)
    theirs = spec_forward(encoder.state_dict(keep_vars=True), config, **inputs)
    assert ours.shape == (2, config.latent_tokens, config.latent_channels)
    torch.testing.assert_close(ours, theirs, rtol=TABLE_ROUNDING, atol=TABLE_ROUNDING)

    incoming = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    our_gradients = torch.autograd.grad(ours, parameters, incoming, allow_unused=True)
    their_gradients = torch.autograd.grad(theirs, parameters, incoming, allow_unused=True)
    for name, actual, expected in zip(names, our_gradients, their_gradients, strict=True):
        if expected is None:
            assert actual is None, f"{name} should have no gradient"
            continue
        assert (actual - expected).norm() <= TABLE_ROUNDING * expected.norm(), name
    unused = {name for name, gradient in zip(names, our_gradients, strict=True) if gradient is None}
    assert unused == (set() if encode else {"patch_embed.weight", "patch_embed.bias"})


@pytest.mark.parametrize("side", [12, 20])
def test_other_image_sizes_match_the_spec(side, tiny_config, make_model):
    config = dataclasses.replace(tiny_config.model, image_size=side, latent_tokens=0)
    encoder = make_model(config).encoder.double()
    inputs = arguments(config)
    assert config.latent_tokens == (side // 4) ** 2
    torch.testing.assert_close(
        encoder(**inputs),
        spec_forward(encoder.state_dict(), config, **inputs),
        rtol=TABLE_ROUNDING,
        atol=TABLE_ROUNDING,
    )


def test_samples_do_not_see_each_other(tiny_model, tiny_config):
    encoder, inputs = tiny_model.encoder.double(), arguments(tiny_config.model, batch=3)
    alone = {name: value[1:2] for name, value in inputs.items()}
    torch.testing.assert_close(encoder(**alone), encoder(**inputs)[1:2], rtol=1e-12, atol=1e-12)


# Counted like the released code: without latent and patch tokens, with a time vector of `width` that it never uses.
@pytest.mark.parametrize(("preset", "millions"), [("B", 130.59), ("M", 231.51), ("L", 458.22), ("XL", 675.33)])
def test_parameter_counts_match_the_published_sizes(preset, millions):
    config = ModelConfig(encoder=from_tree(EncoderConfig, {"preset": preset}))
    with torch.device("meta"):
        encoder = GenerativeEncoder(config)
    counted = sum(
        p.numel() for name, p in encoder.named_parameters() if not name.startswith(("latent_tokens", "patch_embed"))
    )
    assert round((counted + config.encoder.width) / 1e6, 2) == millions


def test_initial_weights_have_their_distributions(tiny_config):
    config = with_encoder(tiny_config.model, width=64, in_context_tokens=40)
    config = dataclasses.replace(config, num_classes=60, image_size=32, latent_tokens=0)
    encoder = GenerativeEncoder(config)
    encoder.initialize(torch.Generator().manual_seed(0))
    state = dict(encoder.state_dict())
    assert torch.equal(state.pop("latent_tokens")[0], sincos_1d(torch.arange(64), 64))
    for name in ("label_embed.weight", "time_embed.fc1.weight", "time_embed.fc2.weight", "in_context_posemb"):
        assert_normal(state.pop(name), 0.02, name)
    assert_normal(state.pop("time_embed.frequencies"), 1.0, "frequencies")
    # The released code keeps PyTorch's defaults for this convolution, as the trace's weights show.
    for name in ("patch_embed.weight", "patch_embed.bias"):
        assert_uniform(state.pop(name), (3 * 4 * 4) ** -0.5, name)
    for name, value in state.items():
        if name.endswith("bias") or "modulation" in name or name == "final_layer.linear.weight":
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            assert_uniform(value, math.sqrt(6 / sum(value.shape)), name)


def assert_normal(value: Tensor, deviation: float, name: str) -> None:
    # Five standard errors; for the smallest tensor, of 256 values, one is 4.4 %.
    assert value.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * value.numel())), name
    assert value.abs().max() > 2 * deviation, f"{name} looks truncated"


def assert_uniform(value: Tensor, bound: float, name: str) -> None:
    assert value.abs().max() <= bound * (1 + 1e-6), name
    assert value.abs().max() > 0.9 * bound, name
    assert abs(value.mean()) < 5 * bound / math.sqrt(3 * value.numel()), name


def test_initial_weights_are_drawn_in_a_fixed_order(tiny_config):
    """A seed must give the same weights after a refactoring, so this test fixes the order of the draws."""
    encoder = GenerativeEncoder(tiny_config.model)
    encoder.initialize(torch.Generator().manual_seed(7))
    generator, state = torch.Generator().manual_seed(7), encoder.state_dict()
    drawn = ["input_proj", "time_embed.fc1", "time_embed.fc2"]
    for i in range(tiny_config.model.encoder.depth):
        drawn += [f"blocks.{i}.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc_in", "mlp.fc_out")]
        drawn.append(f"modulation.{i}")
    values = {}
    for name in (*drawn, "final_layer.modulation", "final_layer.linear"):
        values[name] = torch.nn.init.xavier_uniform_(torch.empty(state[f"{name}.weight"].shape), generator=generator)
    for name, value in values.items():
        if "modulation" not in name and not name.startswith(("time_embed", "final_layer")):
            assert torch.equal(state[f"{name}.weight"], value), name
    bound = (3 * 4 * 4) ** -0.5
    for name in ("patch_embed.weight", "patch_embed.bias"):
        expected = torch.empty(state[name].shape).uniform_(-bound, bound, generator=generator)
        assert torch.equal(state[name], expected), name
    assert torch.equal(state["time_embed.frequencies"], torch.empty(256).normal_(generator=generator))
    for name in ("time_embed.fc1.weight", "time_embed.fc2.weight", "label_embed.weight", "in_context_posemb"):
        assert torch.equal(state[name], torch.empty(state[name].shape).normal_(std=0.02, generator=generator)), name


def test_a_model_from_the_meta_device_gets_the_same_initial_weights(tiny_config):
    with torch.device("meta"):
        encoder = GenerativeEncoder(tiny_config.model)
    encoder.to_empty(device="cpu")
    other = GenerativeEncoder(tiny_config.model)
    for one in (encoder, other):
        one.initialize(torch.Generator().manual_seed(0))
    assert all(
        torch.equal(a, b)
        for part in ("parameters", "buffers")
        for a, b in zip(getattr(encoder, part)(), getattr(other, part)(), strict=True)
    )


def test_a_fresh_encoder_predicts_zero(tiny_config):
    encoder = GenerativeEncoder(tiny_config.model)
    encoder.initialize(torch.Generator().manual_seed(0))
    assert not encoder(**arguments(tiny_config.model, dtype=torch.float32)).any()


def test_autocast_is_closer_to_float64_than_a_bfloat16_model(tiny_model, tiny_config):
    """Norms, time embedding and residual in float32 must pay off; gradients are finite and float32."""
    encoder, inputs = tiny_model.encoder, arguments(tiny_config.model, batch=4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = encoder(**inputs)
    ours.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in encoder.parameters())

    def cast(dtype):
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}

    with torch.no_grad():
        truth = encoder.double()(**cast(torch.float64))
        low = encoder.bfloat16()(**cast(torch.bfloat16))
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - truth).norm() <= (low.double() - truth).norm()


def test_matmul_dtype_follows_autocast():
    x = torch.zeros(1)
    assert matmul_dtype(x) == torch.float32
    assert matmul_dtype(x.double()) == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul_dtype(x) == torch.bfloat16


def test_a_block_compiles_without_a_graph_break(tiny_model, tiny_config):
    """`aot_eager` traces forward and backward as Inductor does, and runs them at once."""
    encoder = tiny_model.encoder
    inputs = arguments(tiny_config.model, dtype=torch.float32)

    def run() -> tuple[Tensor, Tensor]:
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = encoder(**inputs)
        out.float().square().mean().backward()
        return out, encoder.blocks[1].attn.qkv.weight.grad.clone()

    out, gradient = run()
    encoder.blocks[1].compile(fullgraph=True, backend="aot_eager")
    compiled_out, compiled_gradient = run()
    assert "_orig_mod" not in "".join(encoder.state_dict())
    # bfloat16 matmuls in another order: one unit of 8 bits.
    for actual, expected in ((compiled_out, out), (compiled_gradient, gradient)):
        assert (actual - expected).norm() <= 2.0**-7 * expected.norm()
