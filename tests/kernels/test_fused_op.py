"""Tests of the C++ and Triton backends of all block ops; tests/kernels/test_OP.py has those of a single op.

The Triton backends run on a GPU if there is one, else in Triton's interpreter. That takes milliseconds per program
instance, so their shapes are small.
"""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from unite_fast import kernels
from unite_fast.kernels import backend
from unite_fast.kernels.fused_op import as_tuple
from unite_fast.kernels.registry import OPS, Size

HEAD_DIM = 14
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "autocast": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
}
"""Dtypes of the residual, and of branch, modulation and results."""
SHAPES = [
    *(("native", shape) for shape in [(2, 150, 42), (5, 123, 123), (1, 1, 301), (3, 65, 16), (2, 64, 130)]),
    *(("triton", shape) for shape in [(2, 21, 42), (3, 5, 123), (1, 1, 301), (2, 17, 16)]),
]
"""Several chunks of tokens, widths that are not a multiple of a vector, a single token."""
SEVERAL_CHUNKS = {"native": 70, "triton": 21}
"""Tokens: more than one program or task of the backend takes."""


@pytest.fixture(autouse=True, params=["native", "triton"])
def backend_name(request):
    if missing := backend.why_missing(request.param):
        pytest.skip(missing)
    with backend.using(request.param):
        yield request.param


native_only = pytest.mark.parametrize("backend_name", ["native"], indirect=True)


@pytest.fixture(params=[name for name, op in OPS.items() if op.part == "block"])
def case(request, op_case):
    """Makes (op, reference, inputs with a gradient) for a size and a pair of dtypes."""

    def make(b=2, t=9, d=42, residual=torch.float32, other=torch.float32):
        heads = max(d // HEAD_DIM, 1)
        return op_case(request.param, Size(b, t, d, heads, HEAD_DIM, hidden=d, residual=residual, other=other))

    return make


def run(op, inputs):
    """Outputs and gradients, in order."""
    outputs = op(*inputs)
    return *(o.detach() for o in outputs), *torch.autograd.grad(outputs, inputs, incoming_gradients(outputs))


def incoming_gradients(outputs):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(o.shape, generator=generator).to(o) for o in outputs]


def assert_same(ours, others):
    for mine, other in zip(ours, others, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


def result_dtypes(outputs):
    return tuple(o.dtype for o in outputs)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("backend_name", "shape"), SHAPES, indirect=["backend_name"])
def test_outputs_and_gradients_against_float64(case, shape, dtypes, judge):
    op, reference, inputs = case(*shape, *DTYPES[dtypes])
    roundings = op.op.roundings if dtypes == "bfloat16" else 1
    judge(op, reference, inputs, result_dtypes(op(*inputs.values())), roundings)


def test_an_unused_output_equals_a_zero_incoming_gradient(case, backend_name):
    op, _, inputs = case(2, SEVERAL_CHUNKS[backend_name], 42)
    outputs = op(*inputs.values())
    incoming = incoming_gradients(outputs)
    for i, (output, gradient) in enumerate(zip(outputs, incoming, strict=True)):
        zeros = [gradient if j == i else torch.zeros_like(other) for j, other in enumerate(incoming)]
        expected = torch.autograd.grad(outputs, list(inputs.values()), zeros, retain_graph=True)
        assert_same(torch.autograd.grad(output, list(inputs.values()), gradient, retain_graph=True), expected)


@pytest.mark.parametrize("layout", ["tokens", "batch", "channels", "transposed", "expanded"])
def test_strided_inputs(case, layout, judge):
    op, reference, inputs = case(4, 12, 42)
    name = next(iter(inputs))
    x = inputs[name].detach()
    b, t, d = x.shape
    inputs[name] = {
        "tokens": x.new_zeros(b, 2 * t, d)[:, ::2].copy_(x),
        "batch": x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels": x.new_zeros(b, t, 2 * d)[..., ::2].copy_(x),
        "transposed": x.mT.contiguous().mT,
        "expanded": x[:1].expand(b, t, d),
    }[layout]
    judge(op, reference, inputs, result_dtypes(op(*inputs.values())))


@pytest.mark.parametrize("dtypes", DTYPES)
def test_repeated_calls_give_the_same_bits(case, dtypes, backend_name):
    op, _, inputs = case(2, SEVERAL_CHUNKS[backend_name], 42, *DTYPES[dtypes])
    assert_same(*(run(op, list(inputs.values())) for _ in range(2)))


@native_only
@pytest.mark.parametrize("dtypes", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(case, dtypes):
    """Large enough to be split among threads."""
    op, _, inputs = case(3, 200, 84, *DTYPES[dtypes])
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(op, list(inputs.values())))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(other, results[0])


def test_incoming_gradients_are_not_overwritten(case):
    op, _, inputs = case()
    outputs = op(*inputs.values())
    incoming = incoming_gradients(outputs)
    copies = [g.clone() for g in incoming]
    torch.autograd.grad(outputs, list(inputs.values()), incoming)
    assert_same(incoming, copies)


@pytest.mark.parametrize("shape", [(0, 5, 42), (3, 0, 42), (0, 0, 42)])
def test_empty_batches_and_empty_sequences(case, shape):
    op, reference, inputs = case(*shape)
    ours, expected = (run(function, list(inputs.values())) for function in (op, reference))
    assert_same(ours, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_inputs_affect_only_their_token(case, bad):
    op, _, inputs = case(2, 5, 42)
    first, *others = (x.detach() for x in inputs.values())
    changed = first.clone()
    changed[0, 2] = bad
    for actual, expected in zip(op(changed, *others), op(first, *others), strict=True):
        if actual.dim() == 4:
            actual, expected = actual.transpose(1, 2), expected.transpose(1, 2)
        # A NaN differs from itself, so this is every number that is not the one without the bad token.
        affected = (actual != expected).flatten(2).any(dim=2).nonzero().tolist()
        assert affected == [[0, 2]]
        assert not actual[0, 2].isfinite().any()


@pytest.mark.parametrize("dtypes", DTYPES)
def test_opcheck(case, dtypes):
    """PyTorch checks the schema, the fake and the gradient, also traced with dynamic shapes."""
    op, _, inputs = case(2, 9, 42, *DTYPES[dtypes])
    fused = op.op.fused
    arguments = op.op.inputs(op.example | inputs)
    torch.library.opcheck(fused.op, arguments)
    outputs = tuple(o.detach() for o in as_tuple(fused.op(*arguments)))
    incoming = [torch.randn_like(o) for o in fused.all_results(arguments, outputs)]
    saved = [x.detach() if isinstance(x, torch.Tensor) else x for x in fused.saved(arguments, outputs)]
    torch.library.opcheck(fused.backward_op, (*incoming, *saved))


@pytest.mark.parametrize("dtypes", DTYPES)
def test_it_compiles_to_one_graph(case, dtypes):
    op, _, inputs = case(2, 9, 42, *DTYPES[dtypes])
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, list(inputs.values())), run(op, list(inputs.values())))


def test_activation_checkpointing_gives_the_same_bits(case):
    op, _, inputs = case()

    def checkpointed(*x):
        return checkpoint(op, *x, use_reentrant=False)

    assert_same(run(checkpointed, list(inputs.values())), run(op, list(inputs.values())))


def test_autocast_casts_nothing(case, device):
    op, _, inputs = case(2, 9, 42, *DTYPES["autocast"])
    with torch.autocast(device.type, torch.bfloat16):
        under_autocast = run(op, list(inputs.values()))
    assert_same(under_autocast, run(op, list(inputs.values())))


def test_fake_tensors_give_shapes_and_dtypes(case):
    op, _, inputs = case(2, 9, 42, *DTYPES["autocast"])
    expected = op(*inputs.values())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        actual = op(*(mode.from_tensor(x) for x in inputs.values()))
    for fake, real in zip(actual, expected, strict=True):
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_a_second_derivative_is_refused(case):
    op, _, inputs = case()
    first = torch.autograd.grad(op(*inputs.values())[0].sum(), next(iter(inputs.values())), create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        first.sum().backward()


def linear_of(x):
    weight, bias = torch.ones(6, x.shape[-1], requires_grad=True), torch.zeros(6, requires_grad=True)
    return kernels.linear(x, weight, bias), weight


@native_only
def test_a_second_derivative_of_a_linear_is_refused():
    """Its backward pass runs PyTorch's operators, which have derivatives."""
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    y, weight = linear_of(x)
    first = torch.autograd.grad((y * y).sum(), weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@native_only
@pytest.mark.parametrize("fails", [False, True])
def test_autocast_is_on_again_after_an_op(fails):
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), pytest.MonkeyPatch.context() as monkeypatch:
        if fails:
            monkeypatch.setattr(torch.nn.functional, "linear", None)
        with pytest.raises(TypeError) if fails else contextlib.nullcontext():
            linear_of(x)
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
