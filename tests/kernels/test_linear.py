"""The Linears and attention: outputs and gradients against float64, and which tensors they save for backward."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unite_fast import kernels
from unite_fast.kernels import backend, matmul, tensors
from unite_fast.kernels.adaln import gated_residual_adaln_ref
from unite_fast.kernels.attention_backends import ON_CPU
from unite_fast.kernels.fused_op import as_tuple
from unite_fast.kernels.qk_norm_rope import qk_norm_rope_ref, split
from unite_fast.kernels.registry import OPS
from unite_fast.kernels.swiglu import swiglu_ref

B, T, D, N, HEADS = 3, 70, 24, 20, 2


def gated_op(*tensors):
    """In the order of the dispatcher op, where the branch's bias comes before the Linear's weight."""
    *inputs, branch_bias, weight, bias = tensors
    return kernels.gated_residual_adaln_linear(*inputs, weight, bias, branch_bias)


def gated_ref(x, branch, gate, norm_weight, shift, scale, branch_bias, weight, bias):
    dtype = torch.float64 if x.dtype == torch.float64 else branch.dtype
    vectors = gate, norm_weight, shift, scale
    x, h = gated_residual_adaln_ref(x, branch, *vectors, out_dtype=dtype, branch_bias=branch_bias)
    return x, F.linear(h, weight.to(dtype), bias.to(dtype))


def containing(x, bias=None):
    """x, where the bias is a part of it and gets the sum of its gradient."""
    return x if bias is None else x + (bias - bias.detach()).to(x.dtype)


def linear_of(f):
    def op(x, weight, bias, x_bias=None):
        return F.linear(f(containing(x, x_bias)), weight.to(x.dtype), bias.to(x.dtype))

    return op


def norm_ref(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-12) * weight + bias


def layer_norm_ref(x, norm_weight, norm_bias, weight, bias):
    return F.linear(norm_ref(x, norm_weight, norm_bias), weight, bias)


def layer_norm_op(x, norm_weight, norm_bias, weight, bias):
    return kernels.layer_norm_linear(x, norm_weight, norm_bias, weight, bias, 1e-12)


def residual_norm_ref(x, branch, norm_weight, norm_bias, weight, bias, branch_bias=None):
    dtype = torch.float64 if x.dtype == torch.float64 else branch.dtype
    x = x + containing(branch, branch_bias)
    h = norm_ref(x, norm_weight, norm_bias)
    return x, F.linear(h.to(dtype), weight.to(dtype), bias.to(dtype))


def residual_norm_op(x, branch, norm_weight, norm_bias, weight, bias, branch_bias=None):
    return kernels.residual_layer_norm_linear(x, branch, norm_weight, norm_bias, weight, bias, 1e-12, branch_bias)


def attend(function, token_range):
    angle = torch.linspace(0, 3, T * D // HEADS // 2).view(T, -1)

    def op(qkv, q_weight, k_weight):
        tables = (table.to(q_weight.dtype) for table in (angle.cos(), angle.sin()))
        return function(qkv, HEADS, q_weight, k_weight, *tables, token_range)

    return op


def attention_formula(qkv, heads, q_weight, k_weight, cos, sin, token_range):
    q, k, v = split(qkv, heads) if cos is None else qk_norm_rope_ref(qkv, heads, q_weight, k_weight, cos, sin)
    if token_range is not None:
        q = q[:, :, slice(*token_range)]
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@dataclass
class Case:
    ours: object
    reference: object
    shapes: dict[str, tuple[int, ...]]
    roundings: int = 1


ATTENTION_ROUNDINGS = 7
"""Roundings to bfloat16 up to the gradient of qkv: q, k, the probabilities, the result, the gradient of the scores, and
the gradient of q or k before and after norm and rotation."""
WEIGHTS = {"weight": (N, D), "bias": (N,)}
CASES = {
    "linear": Case(kernels.linear, linear_of(lambda x: x), {"x": (B, T, D), **WEIGHTS}, 3),
    "swiglu_linear": Case(kernels.swiglu_linear, linear_of(swiglu_ref), {"x": (B, T, 2 * D), **WEIGHTS}, 3),
    "gelu_linear": Case(kernels.gelu_linear, linear_of(F.gelu), {"x": (B, T, D), **WEIGHTS}, 3),
    "swiglu_linear, sharing": Case(
        kernels.swiglu_linear, linear_of(swiglu_ref), {"x": (B, T, 2 * D), **WEIGHTS, "x_bias": (2 * D,)}, 3
    ),
    "gelu_linear, sharing": Case(
        kernels.gelu_linear, linear_of(F.gelu), {"x": (B, T, D), **WEIGHTS, "x_bias": (D,)}, 3
    ),
    "layer_norm_linear": Case(
        layer_norm_op, layer_norm_ref, {"x": (B, T, D), "norm_weight": (D,), "norm_bias": (D,), **WEIGHTS}, 3
    ),
    "residual_layer_norm_linear": Case(
        residual_norm_op,
        residual_norm_ref,
        {"x": (B, T, D), "branch": (B, T, D), "norm_weight": (D,), "norm_bias": (D,), **WEIGHTS},
        4,
    ),
    "residual_layer_norm_linear, sharing": Case(
        residual_norm_op,
        residual_norm_ref,
        {
            "x": (B, T, D),
            "branch": (B, T, D),
            "norm_weight": (D,),
            "norm_bias": (D,),
            **WEIGHTS,
            "branch_bias": (D,),
        },
        4,
    ),
    "gated_residual_adaln_linear": Case(
        gated_op,
        gated_ref,
        {
            "x": (B, T, D),
            "branch": (B, T, D),
            "gate": (B, D),
            "norm_weight": (D,),
            "shift": (B, D),
            "scale": (B, D),
            "branch_bias": (D,),
            **WEIGHTS,
        },
        4,
    ),
    "attention": Case(
        attend(kernels.attention, None),
        attend(attention_formula, None),
        {"qkv": (B, T, 3 * D), "q": (12,), "k": (12,)},
        ATTENTION_ROUNDINGS,
    ),
    "attention of a token range": Case(
        attend(kernels.attention, (5, 68)),
        attend(attention_formula, (5, 68)),
        {"qkv": (B, T, 3 * D), "q": (12,), "k": (12,)},
        ATTENTION_ROUNDINGS,
    ),
    "attention, plain": Case(
        lambda qkv: kernels.attention(qkv, HEADS),
        lambda qkv: attention_formula(qkv, HEADS, None, None, None, None, None),
        {"qkv": (B, T, 3 * D)},
        ATTENTION_ROUNDINGS - 3,
    ),
    "attention, plain, sharing": Case(
        lambda qkv, qkv_bias: kernels.attention(qkv, HEADS, qkv_bias=qkv_bias),
        lambda qkv, qkv_bias: attention_formula(containing(qkv, qkv_bias), HEADS, None, None, None, None, None),
        {"qkv": (B, T, 3 * D), "qkv_bias": (3 * D,)},
        ATTENTION_ROUNDINGS - 3,
    ),
}
OP_CASES = [name for name in CASES if name != "attention, plain, sharing"]
"""Those whose tensors are the arguments of one operator."""


@pytest.fixture(autouse=True)
def backend_name(fast_backend_on_a_cpu):
    return fast_backend_on_a_cpu


native_only = pytest.mark.parametrize("fast_backend_on_a_cpu", ["native"], indirect=True)


@pytest.fixture(params=CASES)
def case(request, backend_name):
    if backend_name == "triton" and request.param.startswith("attention"):
        pytest.skip("on a GPU, attention is PyTorch's own")
    return CASES[request.param]


@pytest.fixture
def inputs(draw):
    def make(case: Case, dtype=torch.float32):
        return {
            name: draw(*shape, dtype=dtype if len(shape) == 3 else torch.float32) for name, shape in case.shapes.items()
        }

    return make


def run(op, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs.values()]
    outputs = as_tuple(op(*inputs))
    generator = torch.Generator().manual_seed(3)
    incoming = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    return *(o.detach() for o in outputs), *torch.autograd.grad(outputs, inputs, incoming)


@pytest.mark.parametrize(
    ("dtype", "bfloat16_matmuls"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)],
    indirect=["bfloat16_matmuls"],
    ids=["float32", "bfloat16", "bfloat16-in-float32"],
)
def test_outputs_and_gradients_against_float64(case, inputs, dtype, bfloat16_matmuls, judge):
    arguments = inputs(case, dtype)
    if "norm_bias" in arguments:
        arguments["x"] = arguments["x"].float()
    if "branch" in arguments:
        arguments["x"] = arguments["x"].float()

    def autocast(op):
        def run(*tensors):
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16 and tensors[0].dtype != torch.float64):
                return op(*tensors)

        return run

    ours = autocast(case.ours)

    dtypes = tuple(r.dtype for r in as_tuple(ours(*arguments.values())))
    assert dtypes[-1] == dtype
    judge(ours, autocast(case.reference), arguments, dtypes, case.roundings)


@native_only
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("attention")])
@pytest.mark.parametrize("precision", ON_CPU)
def test_attention_in_a_chosen_precision(name, precision, inputs, judge, monkeypatch):
    """It does not depend on the CPU's instructions, and has the bits of the CPU on which `sdpa` means it."""
    case, same, cpu = CASES[name], precision == "sdpa_bfloat16", torch.device("cpu")
    arguments = inputs(case, torch.bfloat16)
    results = {}
    for chosen in ("sdpa", precision):
        backend.use_attention(chosen, cpu)
        for instructions in (True, False):
            monkeypatch.setattr(matmul, "bfloat16_instructions", lambda answer=instructions: answer)
            results[chosen, instructions] = run(case.ours, arguments)
    judge(case.ours, case.reference, arguments, (torch.bfloat16,), case.roundings)
    for instructions in (True, False):
        for i, actual in enumerate(results[precision, instructions]):
            assert torch.equal(actual, results["sdpa", same][i]) and not torch.equal(
                actual, results["sdpa", not same][i]
            )


@pytest.mark.parametrize("autocast", [True, False])
def test_a_bias_is_shared_on_the_triton_backend_in_bfloat16(autocast, backend_name, draw):
    x, weight, bias = draw(2, 5, 8), draw(16, 8), draw(16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        own, left = kernels.shared_bias(x, bias)
        out = kernels.swiglu(kernels.linear(x, weight, own), left)
        expected = kernels.swiglu(kernels.linear(x, weight, bias))
    assert (left is bias) == (not own.requires_grad) == (autocast and backend_name == "triton")
    assert torch.equal(out, expected)
    gradients = [torch.autograd.grad(y.float().sum(), bias)[0] for y in (out, expected)]
    # The reader sums before it rounds to bfloat16: each of the ten terms then has one rounding less.
    torch.testing.assert_close(*gradients, rtol=0, atol=10 * 2.0**-8 if autocast else 0)
    assert gradients[0].any()


def test_plain_pytorch_reads_a_result_with_a_shared_bias(backend_name, draw):
    x, residual, weight, bias = draw(2, 5, 8), draw(2, 5, 16), draw(16, 8), draw(16).requires_grad_()

    def loss(result, left):
        with torch.autocast("cpu", enabled=False):
            total = residual + tensors.containing(tensors.upcast(result), left)
            return F.layer_norm(total, (16,)).pow(3).sum()

    with torch.autocast("cpu", torch.bfloat16):
        own, left = kernels.shared_bias(x, bias)
        losses = loss(kernels.linear(x, weight, own), left), loss(kernels.linear(x, weight, bias), None)
    assert (left is bias) == (backend_name == "triton") and torch.equal(*losses)
    ours, expected = (torch.autograd.grad(each, bias)[0] for each in losses)
    # Without sharing, each of the ten terms is rounded to bfloat16 before the sum.
    assert (ours - expected).norm() <= 2.0**-8 * expected.norm() and ours.dtype == torch.float32


def test_a_matmul_is_exact_up_to_its_last_rounding(draw, bfloat16_matmuls):
    """Half a unit in the last place of bfloat16, and 41 roundings of the sum to float32."""
    x, weight, bias = draw(50, 40, dtype=torch.bfloat16), draw(30, 40), draw(30)
    actual = matmul.matmul(x, weight, bias)
    exact = F.linear(x.double(), weight.bfloat16().double(), bias.bfloat16().double())
    sizes = F.linear(x.double().abs(), weight.bfloat16().double().abs(), bias.bfloat16().double().abs())
    assert ((actual.double() - exact).abs() <= 2.0**-8 * exact.abs() + (1 + 2.0**-8) * 41 * 2.0**-24 * sizes).all()


def test_the_bias_gradient_is_summed_in_float32(draw, bfloat16_matmuls):
    """The bound is that of n float32 additions in any order. Rounding to bfloat16 would exceed it a thousandfold."""
    d_y, x = draw(300, 30, dtype=torch.bfloat16), draw(300, 40, dtype=torch.bfloat16)
    _, _, d_bias = matmul.matmul_backward(d_y, x, draw(30, 40), True)
    sizes = d_y.double().abs().sum(0)
    assert d_bias.dtype == torch.float32
    assert ((d_bias.double() - d_y.double().sum(0)).abs() <= 299 * 2.0**-24 * sizes).all()


@native_only
@pytest.mark.parametrize("bfloat16_matmuls", [False], indirect=True)
def test_float32_matmuls_stay_in_float32_under_autocast(draw, monkeypatch, bfloat16_matmuls):
    """Autocast is on in a forward pass and would cast back to bfloat16, which is ten times slower."""
    calls = []

    def record(x, weight, bias):
        calls.append((x.dtype, weight.dtype, torch.is_autocast_enabled("cpu")))
        return linear(x, weight, bias)

    linear = F.linear
    monkeypatch.setattr(matmul.torch.nn.functional, "linear", record)
    with torch.autocast("cpu", torch.bfloat16):
        y = kernels.linear(draw(50, 40).requires_grad_(), draw(30, 40), draw(30))
    assert y.dtype == torch.bfloat16
    assert calls == [(torch.float32, torch.float32, False)]


def fused(name):
    return OPS["attention" if name.startswith("attention") else name.split(",")[0]].fused


def flat(name, tensors, in_float8=False):
    """All arguments in the order of unite_fast::NAME."""
    tensors = list(tensors)
    if name.startswith("attention"):
        angle = torch.linspace(0, 3, T * D // HEADS // 2).view(T, -1)
        arguments = [*tensors, angle.cos(), angle.sin()] if len(tensors) == 3 else [*tensors, None, None, None, None]
        return *arguments, HEADS, *((5, 68) if name == "attention of a token range" else (0, T))
    if name in ("swiglu_linear", "gelu_linear", "residual_layer_norm_linear"):
        tensors.append(None)  # the bias that is not shared
    if "layer_norm_linear" in name:
        return *tensors, 1e-12, in_float8, torch.float32
    return *tensors, in_float8, *([torch.float32] if name == "gated_residual_adaln_linear" else [])


@native_only
@pytest.mark.parametrize("in_float8", [False, True], ids=["", "float8"])
@pytest.mark.parametrize("name", OP_CASES)
def test_opcheck(name, in_float8, inputs):
    op = fused(name)
    arguments = flat(name, (x.requires_grad_() for x in inputs(CASES[name]).values()), in_float8)
    torch.library.opcheck(op.op, arguments)
    outputs = [o.detach() for o in as_tuple(op.op(*arguments))]
    incoming = [torch.randn_like(o) for o in outputs[: op.results]]
    saved = [x.detach() if isinstance(x, torch.Tensor) else x for x in op.saved(arguments, outputs)]
    torch.library.opcheck(op.backward_op, (*incoming, *saved))


@native_only  # tests/kernels/test_casts.py compiles the Triton backends
def test_compilation_and_activation_checkpointing_give_the_same_bits(case, inputs):
    torch._dynamo.reset()
    arguments = inputs(case, torch.bfloat16)

    def ours(*tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return case.ours(*tensors)

    expected = run(ours, arguments)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for actual in (run(compiled, arguments), run(lambda *x: checkpoint(ours, *x, use_reentrant=False), arguments)):
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_only_inputs_and_row_statistics_are_saved(case, inputs):
    """Nothing that backward recomputes."""
    arguments = [
        x.detach().bfloat16().requires_grad_() if x.dim() == 3 else x.requires_grad_() for x in inputs(case).values()
    ]
    saved, known = {}, {x.untyped_storage().data_ptr() for x in arguments}

    def record(x):
        if x.untyped_storage().data_ptr() not in known:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        outputs = as_tuple(case.ours(*arguments))
    outputs_memory = {o.untyped_storage().data_ptr() for o in outputs}
    extra = sum(size for pointer, size in saved.items() if pointer not in outputs_memory)
    # The rotary tables and, for each token and head, at most three float32 numbers.
    assert extra <= 12 * B * T * HEADS + 2 * 4 * T * D // HEADS // 2


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 8), (5, 7), (5,)), r"linear: weight must be \[N, 8\], got \[5, 7\]"),
        (((2, 3, 8), (5, 8), (6,)), r"linear: bias must be \[5\], got \[6\]"),
    ],
)
def test_mismatched_shapes_are_refused(shapes, message, draw):
    with pytest.raises(ValueError, match=message):
        kernels.linear(*(draw(*shape) for shape in shapes))
