"""The Triton backend of bias_relu against float64."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from unite_fast import kernels
from unite_fast.kernels import backend
from unite_fast.kernels.bias_relu import bias_relu_op, bias_relu_ref

F32, BF16 = torch.float32, torch.bfloat16
SHAPES = [(2, 64, 5, 7), (3, 40, 1, 1), (1, 512, 3, 5), (2, 3, 6, 4), (5, 128, 7, 3)]
"""Odd sides, numbers of channels that are no power of two, more than one program."""


@pytest.fixture(autouse=True)
def triton():
    if missing := backend.why_missing("triton"):
        pytest.skip(missing)
    with backend.using("triton"):
        yield


@pytest.fixture
def device():
    return "cpu" if backend.interpreted() else "cuda"


@pytest.fixture
def make(draw, device):
    def inputs(shape, dtype=F32):
        return draw(*shape).to(device, dtype, memory_format=torch.channels_last), draw(shape[1])

    return inputs


def run(function, x, bias):
    x = x.detach().requires_grad_()
    out = function(x, bias)
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return out.detach(), *torch.autograd.grad(out, x, incoming)


def assert_same(ours, others):
    for mine, other in zip(ours, others, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(make, judge, shape, dtype):
    x, bias = make(shape, dtype)

    def bind(function):
        return lambda x: function(x, bias.to(x.dtype) if x.dtype == torch.float64 else bias)

    judge(bind(kernels.bias_relu), bind(bias_relu_ref), {"x": x}, (dtype,))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_same_bits_as_the_reference(make, dtype):
    x, bias = make((2, 64, 5, 7), dtype)
    x[0, 3, 2, 2], x[1, 4, 0, 0], bias[7] = torch.nan, torch.inf, -torch.inf
    ours, expected = run(kernels.bias_relu, x, bias), run(bias_relu_ref, x, bias)
    assert_same([v.nan_to_num(-1) for v in ours], [v.nan_to_num(-1) for v in expected])
    assert ours[0].isnan().sum() == 1
    assert_same(
        [v.nan_to_num(-1) for v in run(kernels.bias_relu, x.contiguous(), bias)], [v.nan_to_num(-1) for v in ours]
    )


def test_only_the_result_is_saved_for_backward(make):
    x, bias = make((2, 64, 5, 7))
    saved = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.add(v.data_ptr()) or v, lambda v: v):
        out = kernels.bias_relu(x.requires_grad_(), bias)
    assert saved == {out.data_ptr()}


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_opcheck(make, dtype):
    x, bias = make((2, 32, 3, 5), dtype)
    torch.library.opcheck(bias_relu_op.op, (x.requires_grad_(), bias))
    out = bias_relu_op.op(x, bias).detach()
    torch.library.opcheck(bias_relu_op.backward_op, (torch.randn_like(out), out))


def test_compiled_and_checkpointed_calls_give_the_same_bits(make):
    x, bias = make((2, 32, 5, 6), BF16)
    torch._dynamo.reset()
    expected = run(kernels.bias_relu, x, bias)
    assert_same(run(torch.compile(kernels.bias_relu, fullgraph=True, backend="aot_eager"), x, bias), expected)
    assert_same(run(lambda *inputs: checkpoint(kernels.bias_relu, *inputs, use_reentrant=False), x, bias), expected)


def test_an_empty_batch(make):
    x, bias = make((0, 32, 4, 4))
    assert all(result.shape == x.shape for result in run(kernels.bias_relu, x, bias))


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3), r"x \[2, 3\]"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(4), r"bias \[4\]"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(3, requires_grad=True), "bias gets no gradient"),
    ],
)
def test_invalid_arguments_are_refused(x, bias, message):
    with pytest.raises(ValueError, match=f"bias_relu: .*{message}"):
        kernels.bias_relu(x, bias)
