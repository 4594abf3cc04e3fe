"""Layers of the encoder against formulas in float64."""

import math

import numpy as np
import pytest
import torch

from unite_fast.model.layers import Attention, SwiGLU, TimeEmbedding, rope_table, sincos_1d, sincos_2d

ROUNDED_TO_FLOAT32 = 1e-7
"""Tables, with values up to 1, are computed in float64 and rounded once: 6e-8."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FLOAT64 = dict(rtol=1e-12, atol=1e-12)
"""For values around 1, from sums of some tens of terms: 1e-15 per term."""


def test_rotary_angles_match_the_formula():
    cos, sin = rope_table(positions=512, head_dim=64)
    assert cos.shape == sin.shape == (512, 32)
    for position, pair in ((0, 0), (1, 0), (511, 0), (300, 7), (511, 31)):
        angle = position / 10000 ** (2 * pair / 64)
        assert cos[position, pair].item() == pytest.approx(math.cos(angle), abs=ROUNDED_TO_FLOAT32)
        assert sin[position, pair].item() == pytest.approx(math.sin(angle), abs=ROUNDED_TO_FLOAT32)


def test_unrotated_tokens_come_first_and_do_not_shift_the_others():
    cos, sin = rope_table(positions=9, head_dim=8, unrotated=4)
    assert (cos[:4] == 1).all()
    assert (sin[:4] == 0).all()
    without = rope_table(positions=9, head_dim=8)
    assert torch.equal(cos[4:], without[0])
    assert torch.equal(sin[4:], without[1])


def test_sincos_1d_matches_the_formula():
    table = sincos_1d(torch.arange(256), 64).numpy()
    rates = 10000.0 ** (-np.arange(32) / 32)
    angle = np.arange(256)[:, None] * rates
    np.testing.assert_allclose(table, np.concatenate([np.sin(angle), np.cos(angle)], 1), atol=ROUNDED_TO_FLOAT32)


def test_sincos_2d_is_column_then_row():
    table = sincos_2d(3, 16)
    line = sincos_1d(torch.arange(3), 8)
    for row in range(3):
        for column in range(3):
            assert torch.equal(table[3 * row + column], torch.cat((line[column], line[row])))


def time_embedding(width: int = 12) -> TimeEmbedding:
    torch.manual_seed(0)
    layer = TimeEmbedding(width)
    torch.nn.init.normal_(layer.frequencies)
    return layer


def test_time_embedding_matches_the_formula():
    layer = time_embedding().double()
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    angle = 2 * math.pi * torch.outer(t, layer.frequencies)
    hidden = torch.cat((angle.sin(), angle.cos()), 1) @ layer.fc1.weight.T + layer.fc1.bias
    expected = (hidden / (1 + (-hidden).exp())) @ layer.fc2.weight.T + layer.fc2.bias
    torch.testing.assert_close(layer(t), expected, **FLOAT64)


def test_time_embedding_is_float32_under_autocast():
    layer, t = time_embedding(), torch.tensor([0.2, 0.7])
    with torch.autocast("cpu", torch.bfloat16):
        embedded = layer(t)
    assert embedded.dtype == torch.float32
    assert torch.equal(embedded, layer(t))


def test_frequencies_are_saved_but_not_trained():
    layer = time_embedding()
    assert "frequencies" in layer.state_dict()
    assert "frequencies" not in dict(layer.named_parameters())


@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_matches_the_formula_head_by_head(qk_norm):
    b, t, heads, k = 2, 7, 3, 8
    torch.manual_seed(0)
    layer = Attention(heads * k, heads, qk_norm).double()
    if qk_norm:
        torch.nn.init.normal_(layer.q_norm.weight, 1, 0.2)
        torch.nn.init.normal_(layer.k_norm.weight, 1, 0.2)
    x = normal(b, t, heads * k)
    angle = normal(t, k // 2, seed=1)
    rotation = torch.exp(1j * angle)

    def prepare(part, norm):
        if qk_norm:
            part = part / part.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt() * norm.weight
        pairs = torch.complex(part[..., 0::2], part[..., 1::2]) * rotation
        return torch.stack((pairs.real, pairs.imag), -1).flatten(-2)

    q, k_, v = (x @ layer.qkv.weight.T + layer.qkv.bias).split(heads * k, -1)
    attended = []
    for head in range(heads):
        own = slice(head * k, (head + 1) * k)
        scores = prepare(q[..., own], layer.q_norm) @ prepare(k_[..., own], layer.k_norm).mT / math.sqrt(k)
        attended.append(scores.softmax(-1) @ v[..., own])
    expected = torch.cat(attended, -1) @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer(x, angle.cos(), angle.sin()), (expected, None), **FLOAT64)
    torch.testing.assert_close(layer(x, angle.cos(), angle.sin(), (2, 5)), (expected[:, 2:5], None), **FLOAT64)


def test_attention_depends_only_on_relative_positions():
    torch.manual_seed(0)
    layer = Attention(16, 2, qk_norm=True).double()
    cos, sin = (table.double() for table in rope_table(40, 8))
    x = normal(1, 5, 16)
    moved, _ = layer(x, cos[30:35], sin[30:35])
    # The table is rounded to float32.
    torch.testing.assert_close(layer(x, cos[:5], sin[:5])[0], moved, rtol=1e-6, atol=1e-6)


def test_attention_without_qk_norm_has_no_norm_weights():
    assert [name for name, _ in Attention(16, 2, qk_norm=False).named_parameters() if "norm" in name] == []


@pytest.mark.parametrize(("width", "hidden"), [(768, 2048), (1024, 2730), (1152, 3072)])
def test_swiglu_has_the_published_hidden_width(width, hidden):
    with torch.device("meta"):
        layer = SwiGLU(width)
    assert layer.fc_in.weight.shape == (2 * hidden, width)
    assert layer.fc_out.weight.shape == (width, hidden)


def swiglu_inputs(width: int) -> list[torch.Tensor | None]:
    """x, branch, branch bias (none), gate, norm weight, shift and scale."""
    shapes = (2, 3, width), (2, 3, width), (2, width), (width,), (2, width), (2, width)
    x, branch, *vectors = (normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
    return [x, branch, None, *vectors]


def test_swiglu_matches_the_formula():
    torch.manual_seed(0)
    layer = SwiGLU(12).double()
    x, branch, _, gate, norm_weight, shift, scale = inputs = swiglu_inputs(12)
    x = x + gate[:, None] * branch
    h = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm_weight * (1 + scale[:, None]) + shift[:, None]
    u, w = (h @ layer.fc_in.weight.T + layer.fc_in.bias).split(32, -1)
    expected = (u * torch.sigmoid(u) * w) @ layer.fc_out.weight.T + layer.fc_out.bias
    actual = layer(*inputs)
    torch.testing.assert_close(actual[0], x, **FLOAT64)
    torch.testing.assert_close(actual[1], expected, **FLOAT64)


def test_padding_changes_neither_output_nor_gradients(monkeypatch):
    """Hidden width 34, padded to 64."""
    torch.manual_seed(0)
    layer = SwiGLU(13).double()
    assert [w.shape for w in layer.weights(padded=True)] == [(128, 13), (128,), (13, 64)]

    def run():
        layer.zero_grad()
        out = layer(*swiglu_inputs(13))[1]
        (out * normal(*out.shape, seed=9)).sum().backward()
        return [out.detach(), *(p.grad for p in layer.parameters())]

    plain, weights = run(), layer.weights
    monkeypatch.setattr(layer, "weights", lambda padded: weights(padded=True))
    torch.testing.assert_close(run(), plain, **FLOAT64)
