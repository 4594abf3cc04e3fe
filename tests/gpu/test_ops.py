"""Every op at the sizes of B, L and XL and at odd ones: outputs and all gradients against float64."""

import pytest
import torch

from unite_fast import kernels
from unite_fast.kernels import backend
from unite_fast.kernels.registry import OPS, Size
from unite_fast.model.layers import rope_table
from unite_fast.randomness import Philox, Stream

pytestmark = pytest.mark.gpu

F32, BF16 = torch.float32, torch.bfloat16
SIZES = {
    "B": ((16, 544, 768), (2, 39, 48)),
    "L": ((4, 288, 1024), (2, 18, 64)),
    "XL": ((3, 257, 1152), (3, 17, 72)),
    "odd": ((5, 123, 123), (3, 13, 23)),
    "one token": ((1, 1, 301), (1, 1, 31)),
}
"""B, T, D on a GPU, and on a CPU."""
TYPES = {"float32": (F32, F32), "autocast": (F32, BF16), "bfloat16": (BF16, BF16)}
"""Dtypes of the residual, and of branch, modulation and results."""


def block(size, types):
    """`Size` for a block's [B, T, D]."""
    (b, t, d), (residual, other) = size, TYPES[types]
    heads = max(d // 64, 1)
    head_dim = max(d // heads // 2 * 2, 2)
    return Size(b, t, d, heads, head_dim, hidden=2 * d, residual=residual, other=other)


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.part == "block"])
@pytest.mark.parametrize(
    ("size", "types"),
    [
        ("B", "autocast"),
        ("B", "bfloat16"),
        ("L", "autocast"),
        ("XL", "autocast"),
        ("odd", "float32"),
        ("one token", "autocast"),
    ],
)
def test_block_ops(name, size, types, judge_and_record, op_case, size_for_device):
    fast, reference, inputs = op_case(name, block(size_for_device(*SIZES[size]), types))
    results = fast(*inputs.values())
    judge_and_record(fast, reference, inputs, tuple(x.dtype for x in results), OPS[name].roundings)


@pytest.mark.parametrize(
    ("real", "toy", "dtype", "norm"),
    [
        ((16, 544, 12, 64), (2, 19, 3, 16), BF16, True),
        ((4, 288, 16, 72), (2, 11, 2, 18), BF16, True),
        ((3, 65, 3, 64), (3, 7, 3, 8), F32, True),
        ((2, 17, 2, 6), (2, 17, 2, 6), BF16, False),
    ],
)
def test_qk_norm_rope(real, toy, dtype, norm, judge_and_record, draw, size_for_device, reference, device):
    b, t, heads, head_dim = size_for_device(real, toy)
    cos, sin = (table.to(device) for table in rope_table(t, head_dim))
    inputs = {"qkv": draw(b, t, 3 * heads * head_dim, dtype=dtype)}
    if norm:
        inputs |= {"q_weight": draw(head_dim, around=1.0), "k_weight": draw(head_dim, around=1.0)}

    def bind(function):
        return lambda qkv, q_weight=None, k_weight=None: function(qkv, heads, q_weight, k_weight, cos, sin)

    judge_and_record(bind(kernels.qk_norm_rope), bind(reference("qk_norm_rope")), inputs, (dtype,) * 3)


@pytest.mark.parametrize(
    ("real", "toy", "dtype"),
    [
        ((16, 544, 4096), (2, 9, 64), BF16),
        ((4, 288, 5504), (2, 5, 86), BF16),
        ((3, 17, 5460), (3, 17, 50), BF16),
        ((3, 17, 26), (3, 17, 26), F32),
    ],
)
def test_swiglu(real, toy, dtype, judge_and_record, draw, size_for_device, reference):
    judge_and_record(
        kernels.swiglu, reference("swiglu"), {"uw": draw(*size_for_device(real, toy), dtype=dtype)}, (dtype,)
    )


@pytest.mark.parametrize(
    ("real", "toy", "y_dtype", "z_dtype"),
    [
        ((3, 64, 256, 32), (3, 2, 9, 32), BF16, F32),
        ((2, 3, 70, 33), (2, 3, 15, 33), F32, F32),
        ((1, 2, 1, 7), (1, 2, 1, 7), BF16, BF16),
    ],
)
@pytest.mark.parametrize("padded", [False, True], ids=["", "lengths"])
def test_flow_loss(real, toy, y_dtype, z_dtype, padded, judge_and_record, draw, size_for_device, device):
    draws, samples, tokens, channels = size_for_device(real, toy)
    t = draw(draws, samples).sigmoid()
    t[0, 0] = 0.98  # beyond the floor of 1 - t
    z = draw(samples, tokens, channels, dtype=z_dtype)
    y = 3 * draw(draws, samples, tokens, channels, around=0.5)
    inputs = {"y": y.to(y_dtype), "weight": draw(channels, around=1.0), "bias": draw(channels)}
    counted = [tokens - b % tokens for b in range(samples)] if padded else [tokens] * samples
    lengths = torch.tensor(counted, device=device) if padded else None

    def formula(y, weight, bias):
        centred = y - y.mean(-1, keepdim=True)
        prediction = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5) * weight + bias
        left = torch.clamp(1 - t.to(weight.dtype), min=0.05)
        errors = ((z.to(weight.dtype) - prediction) / left[:, :, None, None]) ** 2
        return torch.stack([errors[:, b, :length].mean((1, 2)) for b, length in enumerate(counted)], dim=1)

    def fast(y, weight, bias):
        return kernels.flow_loss(y, weight, bias, z, t, 0.05, lengths=lengths)

    judge_and_record(fast, formula, inputs, (F32,))


def numbers_as(exact, *tensors):
    """The tensors, in float64 if `exact`."""
    return [x.double() if exact else x for x in tensors]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((4, 64, 256, 256), BF16), ((2, 256, 37, 51), BF16), ((3, 512, 17, 9), BF16), ((2, 32, 5, 7), F32)],
)
def test_tap_distance(shape, dtype, judge_and_record, draw, on_cuda, reference, device):
    if not on_cuda:
        pytest.skip("tap_distance has no C++ backend")
    y, x = (draw(*shape).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    weight, bias = draw(shape[1]).abs(), draw(shape[1])
    philox = Philox(2**63 + 5, 7, 2**31 - 1 + torch.arange(shape[0], device=device))

    def bind(function):
        def call(y):
            others = numbers_as(y.dtype == torch.float64, x, weight, bias)
            with backend.using("triton" if function is kernels.tap_distance else "reference"):
                tap = function(y, *others, philox, Stream.LPIPS_DROPOUT, 2)
            return tap.distance[:, None], tap.y  # as a matrix, which the judge can transpose

        return call

    judge_and_record(bind(kernels.tap_distance), bind(reference("tap_distance")), {"y": y}, (F32, dtype))


@pytest.mark.parametrize(("shape", "dtype"), [((8, 64, 256, 256), BF16), ((3, 512, 17, 9), BF16), ((2, 40, 5, 7), F32)])
def test_bias_relu(shape, dtype, judge_and_record, draw, on_cuda, reference):
    if not on_cuda:
        pytest.skip("bias_relu has no C++ backend")
    x, bias = draw(*shape).to(dtype, memory_format=torch.channels_last), draw(shape[1])

    def bind(function):
        return lambda x: function(x, *numbers_as(x.dtype == torch.float64, bias))

    judge_and_record(bind(kernels.bias_relu), bind(reference("bias_relu")), {"x": x}, (dtype,))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (2**63 + 12345, 2**32 - 1)])
def test_noise_injection(seed, step, gated, judge_and_record, draw, size_for_device, device):
    draws, samples, tokens, channels = size_for_device((3, 64, 256, 32), (3, 4, 5, 7))
    positions = 2**31 - samples // 2 + torch.arange(samples)  # across the sign bit of 32 bits
    z, t = draw(samples, tokens, channels), draw(draws, samples).sigmoid()
    gate = torch.arange(samples, device=device) % 3 > 0 if gated else None
    # PyTorch computes the normals; their random words come from C++ if it is built.
    with kernels.backend.using("reference"):
        cpu_philox = Philox(seed, step, positions)
        noise = [cpu_philox.normal(Stream.FLOW_NOISE, (tokens, channels), draw=f) for f in range(draws)]
    noise = torch.stack(noise).to(device)

    def formula(z):
        time = t[..., None, None].to(z.dtype)
        noisy = time * z + (1 - time) * noise
        return noisy if gate is None else torch.where(gate[:, None, None], noisy, z)

    philox = Philox(seed, step, positions.to(device))
    judge_and_record(
        lambda z: kernels.noise_injection(z, t, philox, Stream.FLOW_NOISE, gate), formula, {"z": z}, (F32,)
    )


@pytest.mark.parametrize("op", ["gated_residual_norm_adaln", "swiglu"])
def test_repeated_calls_give_the_same_bits(op, op_case, size_for_device):
    fast, _, inputs = op_case(op, block(size_for_device(*SIZES["B"]), "autocast"))
    leaves = list(inputs.values())

    def run():
        outputs = fast(*leaves)
        return *outputs, *torch.autograd.grad(sum(x.float().sum() for x in outputs), leaves)

    assert all(map(torch.equal, run(), run()))


@pytest.mark.parametrize("layout", ["tokens", "channels", "transposed", "expanded"])
def test_strided_inputs(layout, judge_and_record, op_case):
    b, t, d = 4, 12, 48
    fast, formula, inputs = op_case("gated_residual_adaln", block((b, t, d), "float32"))
    x = inputs["x"].detach()
    inputs["x"] = {
        "tokens": x.new_zeros(b, 2 * t, d)[:, ::2].copy_(x),
        "channels": x.new_zeros(b, t, 2 * d)[..., ::2].copy_(x),
        "transposed": x.mT.contiguous().mT,
        "expanded": x[:1].expand(b, t, d),
    }[layout]
    judge_and_record(fast, formula, inputs, (F32, F32), 3)


def test_offsets_beyond_31_bits(device, on_cuda):
    if not on_cuda:
        pytest.skip("takes 10 GB")
    rows, width = 2**31 // 4096 + 3, 4096
    uw = torch.empty(1, rows, width, device=device, dtype=BF16).normal_(
        generator=torch.Generator(device).manual_seed(1)
    )
    assert uw.numel() > 2**31
    assert torch.equal(kernels.swiglu(uw)[:, -3:], kernels.swiglu(uw[:, -3:].clone()))


def test_unwritten_memory_fails_the_judge(judge, draw, poison_memory, reference):
    """The op leaves half of its result unwritten, as a kernel with a wrong mask would."""
    swiglu = reference("swiglu")

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, uw):
            ctx.save_for_backward(uw)
            out = uw.new_empty((*uw.shape[:-1], uw.shape[-1] // 2))
            out[..., :3] = swiglu(uw)[..., :3]
            return out

        @staticmethod
        def backward(ctx, d_out):
            (uw,) = ctx.saved_tensors
            with torch.enable_grad():
                uw = uw.detach().requires_grad_()
                return torch.autograd.grad(swiglu(uw), uw, d_out)[0]

    with pytest.raises(AssertionError, match=r"output 0.*nan"):
        judge(Half.apply, swiglu, {"uw": draw(2, 5, 12)}, (F32,))
