"""The Linears and attention under autocast to bfloat16, at the sizes of B and XL: outputs and all gradients."""

import pytest
import torch
from torch.nn import functional as F

from unite_fast import kernels
from unite_fast.model.layers import rope_table

pytestmark = pytest.mark.gpu

F32, BF16 = torch.float32, torch.bfloat16


def autocast(op, device):
    """Runs `op` under autocast, except in float64."""

    def run(*tensors):
        with torch.autocast(device.type, BF16, enabled=tensors[0].dtype != torch.float64):
            return op(*tensors)

    return run


def linear_of(activation):
    return lambda x, weight, bias: F.linear(activation(x), weight.to(x.dtype), bias.to(x.dtype))


@pytest.fixture
def roundings(on_cuda):
    """The number of roundings to bfloat16. None on a GPU, where cuBLAS may round partial sums too: there only the error
    of the eager formula sets the tolerance."""
    return lambda count: None if on_cuda else count


@pytest.fixture
def weights(draw):
    return lambda inputs, outputs: {"weight": draw(outputs, inputs) / inputs**0.5, "bias": draw(outputs)}


@pytest.fixture(params=["B", "XL"])
def sizes(request, size_for_device):
    """B, T, D."""
    return size_for_device(*{"B": ((8, 544, 768), (2, 19, 48)), "XL": ((2, 257, 1152), (2, 9, 72))}[request.param])


@pytest.mark.parametrize("op", ["linear", "swiglu_linear", "gelu_linear"])
def test_linears_of_an_activation(op, sizes, judge_and_record, draw, weights, roundings, device, reference):
    b, t, d = sizes
    activation, inputs, outputs = {
        "linear": (lambda x: x, d, 3 * d),
        "swiglu_linear": (reference("swiglu"), 8 * d // 3, d),
        "gelu_linear": (F.gelu, 4 * d, d),
    }[op]
    x = draw(b, t, 2 * inputs if op == "swiglu_linear" else inputs, dtype=BF16)
    fast, formula = autocast(getattr(kernels, op), device), autocast(linear_of(activation), device)
    judge_and_record(fast, formula, {"x": x, **weights(inputs, outputs)}, (BF16,), roundings(3))


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-12) * weight + bias


@pytest.mark.parametrize("op", ["layer_norm_linear", "residual_layer_norm_linear"])
def test_layer_norm_linears(op, sizes, judge_and_record, draw, weights, roundings, device):
    b, t, d = sizes
    residual = op == "residual_layer_norm_linear"

    def formula(x, *rest):
        branch, (norm_weight, norm_bias, weight, bias) = (rest[0] if residual else None), rest[-4:]
        dtype = torch.float64 if x.dtype == torch.float64 else BF16
        x = x + branch if residual else x
        y = F.linear(layer_norm(x, norm_weight, norm_bias).to(dtype), weight.to(dtype), bias.to(dtype))
        return (x, y) if residual else y

    inputs = {"x": draw(b, t, d), **({"branch": draw(b, t, d, dtype=BF16)} if residual else {})}
    inputs |= {"norm_weight": draw(d, around=1.0), "norm_bias": draw(d), **weights(d, 3 * d)}
    fast = autocast(lambda *tensors: getattr(kernels, op)(*tensors, 1e-12), device)
    dtypes, count = ((F32, BF16), 4) if residual else ((BF16,), 3)
    judge_and_record(fast, autocast(formula, device), inputs, dtypes, roundings(count))


def test_gated_residual_adaln_linear(sizes, judge_and_record, draw, weights, roundings, device, reference):
    b, t, d = sizes
    gated = reference("gated_residual_adaln")

    def formula(x, branch, gate, norm_weight, shift, scale, weight, bias):
        dtype = torch.float64 if x.dtype == torch.float64 else BF16
        x, h = gated(x, branch, gate, norm_weight, shift, scale, out_dtype=dtype)
        return x, F.linear(h, weight.to(dtype), bias.to(dtype))

    shift, scale, gate = draw(b, 3 * d, dtype=BF16).chunk(3, dim=-1)
    inputs = {
        "x": draw(b, t, d),
        "branch": draw(b, t, d, dtype=BF16),
        "gate": gate,
        "norm_weight": draw(d, around=1.0),
        "shift": shift,
        "scale": scale,
        **weights(d, 4 * d),
    }
    fast = autocast(kernels.gated_residual_adaln_linear, device)
    judge_and_record(fast, autocast(formula, device), inputs, (F32, BF16), roundings(4))


@pytest.mark.parametrize("token_range", [None, (32, 288)])
@pytest.mark.parametrize(
    ("real", "toy"), [((4, 544, 12, 64), (2, 23, 3, 16)), ((2, 544, 16, 72), (2, 23, 2, 18)), ((2, 257, 4, 64), None)]
)
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_attention(real, toy, token_range, masked, judge_and_record, draw, size_for_device, device, on_cuda, reference):
    """The last shape is the decoder's, without norm and rotation. PyTorch's attention has its own roundings."""
    decoder = toy is None
    b, t, heads, head_dim = size_for_device(real, toy or (2, 17, 2, 16))
    if token_range and (decoder or not on_cuda):
        token_range = None if decoder else (3, 12)
    cos, sin = (None, None) if decoder else (table.to(device) for table in rope_table(t, head_dim))
    inputs = {"qkv": draw(b, t, 3 * heads * head_dim, dtype=BF16)}
    if not decoder:
        inputs |= {"q_weight": draw(head_dim, around=1.0), "k_weight": draw(head_dim, around=1.0)}
    lengths = t - 5 * torch.arange(b, device=device) if masked else torch.full((b,), t, device=device)
    mask = (torch.arange(t, device=device) < lengths[:, None])[:, None, None]
    # The tokens whose result means something.
    read = mask[:, 0, 0, slice(*token_range or (0, t)), None]

    def formula(qkv, q_weight=None, k_weight=None):
        if decoder:
            q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        else:
            q, k, v = reference("qk_norm_rope")(qkv, heads, q_weight, k_weight, cos.to(q_weight), sin.to(q_weight))
        q = q if token_range is None else q[:, :, slice(*token_range)]
        scores = q @ k.mT / head_dim**0.5
        scores = scores.masked_fill(~mask, -torch.inf) if masked else scores
        return torch.where(read, (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), 0)

    def fast(qkv, q_weight=None, k_weight=None):
        key_mask = mask if masked else None
        out = kernels.attention(qkv, heads, q_weight, k_weight, cos, sin, token_range, mask=key_mask)
        return torch.where(read, out, 0)

    judge_and_record(fast, formula, inputs, (BF16,), None)
