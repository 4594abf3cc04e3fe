"""Float8 matmuls: rounding against its definition in float64, and the Linears against an emulation in float64."""

import inspect
import math
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from unite_fast.kernels import backend, casts, float8, matmul
from unite_fast.kernels.casts import cast_once
from unite_fast.kernels.float8 import Quantised, dequantise, float8_matmuls, quantise, quantise_ref
from unite_fast.kernels.fused_op import as_tuple
from unite_fast.kernels.registry import OPS, Size

HALF = torch.bfloat16
WIDE = [name for name, op in OPS.items() if "wide" in inspect.signature(op.function).parameters]
SIZE = Size(3, 37, 48, hidden=40, residual=torch.float32, other=HALF)


@pytest.fixture(autouse=True)
def backend_name(fast_backend_on_a_cpu):
    return fast_backend_on_a_cpu


native_only = pytest.mark.parametrize("fast_backend_on_a_cpu", ["native"], indirect=True)


def rounded(x):
    """x [..., K] in float64 as `quantise` rounds it, from the definition: a power of two per row, 3 mantissa bits."""
    largest = x.abs().amax(-1, keepdim=True)
    scale = torch.exp2(torch.ceil(torch.log2(largest / 448))).clamp(min=2.0**-100)
    _, exponent = torch.frexp(x / scale)  # x / scale = m 2^exponent, m in [0.5, 1)
    step = torch.exp2((exponent - 4).clamp(min=-9).double())
    return torch.round(x / scale / step) * step * scale


def same(a, b):
    return torch.equal(a.values.view(torch.uint8), b.values.view(torch.uint8)) and torch.equal(
        a.scale.view(torch.int32), b.scale.view(torch.int32)
    )


@pytest.fixture
def rows(draw):
    """Rows of every size that bfloat16 has, zeros, and rows at the edge of a power of two, [M, 530]."""
    width, numbers = 530, torch.tensor([448.0, 449.0, 447.0, 1.0, 1 / 3])
    sizes = torch.logspace(-44, 38, 42, dtype=torch.float64)[:, None]
    wide = draw(42, width).double() * sizes
    edges = numbers[:, None] * torch.linspace(-1, 1, width) * 2.0**-7
    mixed = draw(6, width) * torch.exp2(torch.linspace(-30, 0, width))
    return torch.cat([wide.clamp(-3.38e38, 3.38e38).float(), torch.zeros(2, width), edges, mixed])


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_rounding_is_that_of_the_definition_in_float64(rows, dtype):
    x = rows.to(dtype)
    values, scale = quantise(x)
    assert values.dtype == torch.float8_e4m3fn and values.shape == x.shape and scale.shape == (len(x), 1)
    assert torch.equal(values.double() * scale, rounded(x.double()))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_errors_are_half_a_unit_of_three_mantissa_bits(rows, dtype):
    """2^-4 of a normal number, and half of e4m3's smallest number, 2^-9, of the others."""
    x = rows.to(dtype)
    quantised, exact = quantise(x), x.double()
    assert (torch.frexp(quantised.scale)[0] == 0.5).all()  # powers of two
    full = exact.abs().amax(-1, keepdim=True) / quantised.scale
    assert ((full > 224) | (quantised.scale == float8.SMALLEST_SCALE)).all() and (full <= 448).all()
    error = (quantised.values.double() * quantised.scale - exact).abs()
    assert (error <= torch.maximum(2.0**-4 * exact.abs(), 2.0**-10 * quantised.scale)).all()
    for target in (torch.float32, HALF):
        assert torch.equal(dequantise(quantised, target).double(), quantised.values.double() * quantised.scale)


def test_columns_are_rows_of_the_transpose(draw):
    x = draw(20, 36)
    assert same(float8.quantise_columns(x), quantise_ref(x.mT.contiguous()))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_row_that_is_not_finite_never_becomes_finite(draw, bad):
    x, weight, bias = draw(5, 32, dtype=HALF), draw(16, 32), draw(16)
    x[2, 3], x[3] = bad, 0
    y = matmul.matmul(x, weight, bias, True)
    assert not y[2].isfinite().any() and y[[0, 1, 3, 4]].isfinite().all()
    assert not dequantise(quantise(x), torch.float32)[2].isfinite().any()
    weight[7, 1] = bad
    y = matmul.matmul(x[:2], weight, bias, True)
    assert not y[:, 7].isfinite().any() and y[:, :7].isfinite().all()
    d_x = matmul.input_gradient(draw(5, 16, dtype=HALF), weight, True)
    assert not d_x[:, 1].isfinite().any() and d_x[:, 2:].isfinite().all()


@native_only
def test_rounding_equals_torchao(rows):
    """Where both have a scale: torchao's have another lower bound, and infinity rounds a row to zeros there."""
    utils = pytest.importorskip("torchao.float8.float8_utils", exc_type=ImportError)
    granularity = pytest.importorskip("torchao.float8.config").ScalingGranularity.AXISWISE
    x = rows[rows.abs().amax(-1) > 1e-12]
    options = {"axiswise_dim": -1, "round_scales_to_power_of_2": True}
    scale = utils.tensor_to_scale(x, torch.float8_e4m3fn, scaling_granularity=granularity, **options)
    values = utils.to_fp8_saturated(x * scale, torch.float8_e4m3fn)
    assert len(x) > 30 and same(quantise(x), Quantised(values, 1 / scale))


@native_only
def test_the_scaled_matmul_has_the_products_of_the_emulation(draw):
    """The call that a GPU makes, in PyTorch's implementation for CPUs: bfloat16 results, float32 sums of 65 terms."""
    a, b, bias = quantise(100 * draw(48, 64)), quantise(draw(32, 64)), draw(32, dtype=HALF)
    try:
        actual = float8.scaled_matmul(a, b, bias).double()
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"this PyTorch has no scaled matmul for CPUs: {error}")
    x, w = (dequantise(one, torch.float32).double() for one in (a, b))
    exact, sizes = x @ w.mT + bias.double(), x.abs() @ w.mT.abs() + bias.double().abs()
    assert ((actual - exact).abs() <= 2.0**-8 * exact.abs() + 2 * 65 * 2.0**-24 * sizes).all()


def rounded_twice(x):
    """As the ops do: to bfloat16, then to float8."""
    return rounded(x.bfloat16().double())


class Emulation(torch.autograd.Function):
    """A float8 Linear in float64."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return rounded_twice(x) @ rounded_twice(weight).mT + bias

    @staticmethod
    def backward(ctx, d_y):
        x, weight = ctx.saved_tensors
        d_x = rounded_twice(d_y) @ rounded_twice(weight.mT).mT
        return d_x, d_y.flatten(0, 1).mT @ x.flatten(0, 1), d_y.sum((0, 1))


@pytest.fixture
def run(draw):
    """Outputs and gradients of an op, as {name: float64}, and the function that computes them from tensors."""

    def make(name):
        op = OPS[name]
        example = op.example(SIZE, draw)
        names = [key for key, value in example.items() if isinstance(value, torch.Tensor)]

        def results(dtype, in_float8=False, function=op.function):
            tensors = [(example[key].to(dtype) if dtype else example[key]).detach().requires_grad_() for key in names]
            outputs = as_tuple(function(**example | dict(zip(names, tensors, strict=True)), wide=in_float8))
            generator = torch.Generator().manual_seed(4)
            incoming = [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in outputs]
            gradients = torch.autograd.grad(outputs, tensors, incoming)
            pairs = [(f"output {i}", o) for i, o in enumerate(outputs)] + list(zip(names, gradients, strict=True))
            return {key: value.detach().double() for key, value in pairs}

        return results

    return make


@pytest.mark.parametrize("name", WIDE)
def test_ops_against_float64(name, run, monkeypatch):
    """float8 adds the error that its emulation in float64 has, and no other: the tolerance is bfloat16's own error,
    twice, and a tenth of float8's, for numbers that bfloat16 moves over the edge between two float8 numbers."""
    results = run(name)
    exact = results(torch.float64)
    with torch.autocast("cpu", HALF):
        in_bfloat16 = results(None, in_float8=True)  # float8 is off
        with float8_matmuls():
            actual = results(None, in_float8=True)
            narrow = results(None, in_float8=False)
    assert all(torch.equal(narrow[key], in_bfloat16[key]) for key in exact)
    for module in ("linear", "norm_linear"):
        emulation = lambda x, w, b, in_float8: Emulation.apply(x, w, b)  # noqa: E731
        monkeypatch.setattr(sys.modules[f"unite_fast.kernels.{module}"], "unfused_linear", emulation)
    emulated = results(torch.float64)
    coarse = set()
    for key, truth in exact.items():
        of_float8, of_bfloat16 = (emulated[key] - truth).norm(), (in_bfloat16[key] - truth).norm()
        assert (actual[key] - emulated[key]).norm() <= 2 * of_bfloat16 + 0.1 * of_float8 + 2.0**-8 * 1e-6, key
        if of_float8 > 4 * of_bfloat16:
            coarse.add(key)
            assert 0.02 * truth.norm() < of_float8 < 0.06 * truth.norm(), key
    outputs = [key for key in exact if key.startswith("output")]
    assert outputs[-1] in coarse
    assert coarse.isdisjoint({"weight", "bias"}) and coarse & {"x", "uw", "u"}


@native_only
@pytest.mark.parametrize("name", WIDE)
def test_compiled_checkpointed_and_unfused_ops_give_the_same_bits(name, run):
    function = OPS[name].function

    def ours(**arguments):
        with torch.autocast("cpu", HALF):
            return function(**arguments)

    def checkpointed(**arguments):
        return checkpoint(ours, **arguments, use_reentrant=False)

    results = run(name)
    torch._dynamo.reset()
    with float8_matmuls():
        expected = results(None, True, ours)
        compiled = results(None, True, torch.compile(ours, fullgraph=True, backend="aot_eager"))
        again = results(None, True, checkpointed)
        with backend.using("reference"):
            reference = results(None, True, ours)
    for key, value in expected.items():
        assert torch.equal(compiled[key], value) and torch.equal(again[key], value)
    # The reference rounds the norm or activation elsewhere, but runs in float8 too.
    with torch.autocast("cpu", HALF), backend.using("reference"):
        in_bfloat16 = results(None, True)
    last = [key for key in expected if key.startswith("output")][-1]
    difference = [(other[last] - expected[last]).norm() for other in (reference, in_bfloat16)]
    assert difference[0] < 0.5 * difference[1]


def test_weights_are_rounded_once_within_cast_once(draw):
    x, weight, bias, d_y = draw(6, 48, dtype=HALF), draw(40, 48), draw(40), draw(6, 40, dtype=HALF)

    def results():
        return matmul.matmul(x, weight, bias, True), matmul.input_gradient(d_y, weight, True)

    expected = results()
    with cast_once([weight, bias]):
        assert all(map(torch.equal, results(), expected))
        casts.cast(weight, HALF).zero_()  # no longer read
        assert all(map(torch.equal, results(), expected))
        weight.mul_(2)  # rounded anew
        assert torch.equal(results()[1], 2 * expected[1])
    assert not casts._copies


def test_the_context_ends(draw):
    with pytest.raises(KeyError), float8_matmuls():
        assert float8.runs_in_float8(True) and not float8.runs_in_float8(False)
        with float8_matmuls(False):
            assert not float8.runs_in_float8(True)
        raise KeyError
    assert not float8.runs_in_float8(True)
