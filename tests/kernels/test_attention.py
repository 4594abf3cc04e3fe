"""attention with a mask. tests/kernels/test_linear.py has attention without one."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from unite_fast.kernels import attention, backend
from unite_fast.kernels.attention import attention_op, attention_ref
from unite_fast.kernels.attention_backends import ATTEND
from unite_fast.kernels.qk_norm_rope import qk_norm_rope_ref, split

B, T, HEADS, HEAD_DIM = 3, 11, 2, 6
D = HEADS * HEAD_DIM


@dataclass
class Case:
    rope: bool
    """Norm and rotation of q and k."""
    token_range: tuple[int, int] | None = None
    bias: bool = False
    """Whether qkv contains a bias that needs its gradient."""


CASES = {
    "norm and rotation": Case(rope=True),
    "of a token range": Case(rope=True, token_range=(2, 9)),
    "sharing": Case(rope=True, bias=True),
    "plain": Case(rope=False),
    "plain, of a token range": Case(rope=False, token_range=(0, 7)),
    "plain, sharing": Case(rope=False, bias=True),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def mask(device) -> Tensor:
    """All tokens, the first ones, and some in between."""
    some = torch.tensor([True, False, False, True, True, False, True, True, False, False, True])
    return torch.stack([torch.ones(T, dtype=torch.bool), torch.arange(T) < 4, some])[:, None, None].to(device)


@pytest.fixture
def inputs(draw):
    def make(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        tensors = {"qkv": draw(B, T, 3 * D, dtype=dtype)}
        if case.rope:
            tensors |= {"q_weight": draw(HEAD_DIM, around=1.0), "k_weight": draw(HEAD_DIM, around=1.0)}
        return tensors | ({"qkv_bias": draw(3 * D)} if case.bias else {})

    return make


ANGLE = torch.linspace(0, 3, T * HEAD_DIM // 2, dtype=torch.float64).view(T, -1)
TABLES = ANGLE.cos(), ANGLE.sin()


def tables(like: Tensor) -> list[Tensor]:
    """cos and sin in float32, or in float64 beside it."""
    return [x.to(like.device, torch.promote_types(like.dtype, torch.float32)) for x in TABLES]


def cut(out: Tensor, mask: Tensor, case: Case) -> Tensor:
    """The result, 0 for masked tokens, which have none that means anything."""
    counts = mask[:, 0, 0, slice(*case.token_range or (0, T)), None]
    return torch.where(counts, out, 0)


def ours(case: Case, inputs: dict[str, Tensor], mask: Tensor):
    names = list(inputs)

    def op(*values):
        named = dict(zip(names, values, strict=True))
        if case.rope:
            named["cos"], named["sin"] = tables(named["qkv"])
        return cut(attention(heads=HEADS, token_range=case.token_range, mask=mask, **named), mask, case)

    return op


def formula(case: Case, inputs: dict[str, Tensor], mask: Tensor):
    """Attention of each sample without its masked tokens."""
    names, kept = list(inputs), [[t for t in range(T) if counts[t]] for counts in mask[:, 0, 0].tolist()]

    def op(*values):
        named = dict(zip(names, values, strict=True))
        qkv, weights = named["qkv"], (named.get("q_weight"), named.get("k_weight"))
        if case.bias:
            qkv = qkv + (named["qkv_bias"] - named["qkv_bias"].detach()).to(qkv.dtype)
        samples = []
        for sample, rows in zip(qkv, kept, strict=True):
            packed, *angles = (torch.stack([x[t] for t in rows]) for x in (sample, *tables(qkv)))
            packed = packed[None]
            q, k, v = qk_norm_rope_ref(packed, HEADS, *weights, *angles) if case.rope else split(packed, HEADS)
            out = iter(((q @ k.mT / math.sqrt(HEAD_DIM)).softmax(-1) @ v).transpose(1, 2).flatten(2)[0])
            samples.append(torch.stack([next(out) if t in rows else qkv.new_zeros(D) for t in range(T)]))
        return torch.stack(samples)[:, slice(*case.token_range or (0, T))]

    return op


def run(op, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Result and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    out = op(*leaves)
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    return out.detach(), *torch.autograd.grad(out, leaves, incoming)


def assert_same(ours, others):
    for mine, other in zip(ours, others, strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)


@every_case
@every_dtype
def test_a_mask_is_attention_without_the_masked_tokens(backend_name, case, dtype, inputs, mask, judge):
    arguments = inputs(case, dtype)
    roundings = None if dtype == torch.bfloat16 else 1
    judge(ours(case, arguments, mask), formula(case, arguments, mask), arguments, (dtype,), roundings)


@every_case
@pytest.mark.parametrize(("dtype", "bad"), [(torch.float32, float("nan")), (torch.bfloat16, float("inf"))])
def test_nothing_of_a_masked_token_reaches_a_result_or_a_gradient(backend_name, case, dtype, bad, inputs, mask):
    arguments = inputs(case, dtype)
    masked = ~mask[:, 0, 0]
    broken = arguments["qkv"].clone()
    broken[masked] = bad
    expected = run(ours(case, arguments, mask), arguments)
    actual = run(ours(case, arguments, mask), arguments | {"qkv": broken})
    assert_same(actual, expected)
    assert all(x.isfinite().all() for x in actual)
    d_qkv = actual[1]
    assert not d_qkv[masked].any() and d_qkv[~masked].any(dim=-1).all()


@pytest.mark.parametrize("name", ["of a token range", "plain, sharing"])
@every_dtype
def test_it_compiles_to_one_graph(backend_name, name, dtype, inputs, mask):
    case, arguments = CASES[name], inputs(CASES[name], dtype)
    op = ours(case, arguments, mask)
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, dynamic=False, backend="aot_eager")
    assert_same(run(compiled, arguments), run(op, arguments))


@pytest.mark.parametrize("name", ATTEND)
def test_with_a_mask_pytorch_attends(name, inputs, mask, monkeypatch):
    """Neither our op nor a package nor an operator that takes no mask."""
    case, arguments = CASES["plain"], inputs(CASES["plain"], torch.bfloat16)
    expected = run(ours(case, arguments, mask), arguments)
    monkeypatch.setattr(backend, "attention_on", lambda device: name)
    monkeypatch.setattr(attention_op, "functions", {})
    monkeypatch.setitem(ATTEND, name, None)
    actual = run(ours(case, arguments, mask), arguments)
    if name != "sdpa_float32":
        assert_same(actual, expected)


def test_a_mask_in_float32(inputs, mask, monkeypatch):
    monkeypatch.setattr(backend, "attention_on", lambda device: "sdpa_float32")
    case = CASES["plain"]
    qkv = inputs(case, torch.bfloat16)["qkv"]
    actual = attention_ref(qkv, HEADS, None, None, None, None, mask=mask)
    expected = attention_ref(qkv.float(), HEADS, None, None, None, None, mask=mask)
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected.bfloat16())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(B, T, dtype=torch.bool), r"mask must be bool \[3, 1, 1, 11\], got torch.bool \[3, 11\]"),
        (
            torch.ones(1, 1, 1, T, dtype=torch.bool),
            r"mask must be bool \[3, 1, 1, 11\], got torch.bool \[1, 1, 1, 11\]",
        ),
        (torch.ones(B, 1, 1, T), r"mask must be bool \[3, 1, 1, 11\], got torch.float32 \[3, 1, 1, 11\]"),
    ],
)
def test_another_mask_is_refused(wrong, message):
    with pytest.raises(ValueError, match=f"attention: {message}"):
        attention(torch.zeros(B, T, 3 * D), HEADS, mask=wrong)
