"""adaln_modulate, gated_residual_adaln and gated_residual_norm_adaln against their formulas. test_fused_op.py has the
tests of every op."""

import pytest
import torch

from unite_fast.kernels import adaln_modulate, gated_residual_adaln, gated_residual_norm_adaln
from unite_fast.kernels.adaln import adaln_modulate_ref, gated_residual_adaln_ref, gated_residual_norm_adaln_ref

NAMES = {
    adaln_modulate: "x weight shift scale",
    gated_residual_adaln: "x branch gate weight shift scale",
    gated_residual_norm_adaln: "x branch gate norm_weight weight shift scale",
}
REFERENCES = {
    adaln_modulate: adaln_modulate_ref,
    gated_residual_adaln: gated_residual_adaln_ref,
    gated_residual_norm_adaln: gated_residual_norm_adaln_ref,
}
GATED = [gated_residual_adaln, gated_residual_norm_adaln]
fast_backends = pytest.mark.parametrize("backend_name", ["native", "triton"], indirect=True)

# dtypes of residual, branch and modulation. The second line is training under autocast.
DTYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
]
ROUNDINGS = 3
"""Roundings to bfloat16 between input and output or input and gradient: the result, the new value of a bfloat16
residual, and its gradient."""

each_op = pytest.mark.parametrize("op", NAMES, ids=lambda op: op.__name__)
each_gated_op = pytest.mark.parametrize("op", GATED, ids=lambda op: op.__name__)


def norm(y, weight):
    return y / torch.sqrt((y * y).mean(dim=2, keepdim=True) + 1e-6) * weight


def adaln_formula(x, weight, shift, scale):
    return norm(x, weight) * (1 + scale[:, None, :]) + shift[:, None, :]


def gated_formula(x, branch, gate, *adaln):
    new = (x + gate[:, None, :] * branch).to(x.dtype)
    return new, adaln_formula(new, *adaln)


def gated_norm_formula(x, branch, gate, norm_weight, *adaln):
    new = norm(x + gate[:, None, :] * branch, norm_weight).to(x.dtype)
    return new, adaln_formula(new, *adaln)


FORMULAS = dict(zip(NAMES, (adaln_formula, gated_formula, gated_norm_formula), strict=True))


def arguments(op, draw, b, t, d, x_dtype=torch.float32, branch_dtype=torch.float32, modulation_dtype=torch.float32):
    inputs = {
        "x": draw(b, t, d, dtype=x_dtype) * (3 if op is adaln_modulate else 1),
        "branch": draw(b, t, d, dtype=branch_dtype),
        "gate": draw(b, d, dtype=modulation_dtype),
        "norm_weight": draw(d, around=1.0),
        "weight": draw(d, around=1.0),
        "shift": draw(b, d, dtype=modulation_dtype),
        "scale": draw(b, d, dtype=modulation_dtype),
    }
    return {name: inputs[name] for name in NAMES[op].split()}


@pytest.mark.parametrize("reference", [False, True], ids=["function", "reference"])
@each_op
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(5, 41, 123), (2, 20, 64)])
def test_outputs_and_gradients_against_float64(op, reference, dtypes, shape, judge, draw):
    results = (dtypes[0],) if op is adaln_modulate else (dtypes[0], dtypes[0])
    roundings = ROUNDINGS if op in GATED and dtypes[0] == torch.bfloat16 else 1
    call = REFERENCES[op] if reference else op
    judge(call, FORMULAS[op], arguments(op, draw, *shape, *dtypes), results, roundings)


@each_op
def test_only_the_modulated_output_has_out_dtype(op, judge, draw):
    def to_bfloat16(*inputs):
        return op(*inputs, out_dtype=torch.bfloat16)

    results = (torch.bfloat16,) if op is adaln_modulate else (torch.float32, torch.bfloat16)
    judge(to_bfloat16, FORMULAS[op], arguments(op, draw, 3, 8, 32), results)


@each_op
def test_strided_inputs(op, judge, draw):
    contiguous = arguments(op, draw, 4, 18, 32)
    strided = {"x": contiguous["x"][:, 1::2]}
    strided["gate"], strided["shift"], strided["scale"] = draw(4, 96).chunk(3, dim=-1)
    if op in GATED:
        strided |= {"x": contiguous["x"][:, :9], "branch": contiguous["branch"][:, ::2]}
    inputs = {name: strided.get(name, x) for name, x in contiguous.items()}
    judge(op, FORMULAS[op], inputs, (torch.float32,) * (2 if op in GATED else 1))


def test_a_token_of_zeros_gives_the_shift(draw):
    inputs = arguments(adaln_modulate, draw, 2, 3, 8) | {"x": torch.zeros(2, 3, 8)}
    assert torch.equal(adaln_modulate(**inputs), inputs["shift"][:, None].expand(2, 3, 8))


def test_a_closed_gate_keeps_the_residual(draw):
    inputs = arguments(gated_residual_adaln, draw, 2, 3, 8) | {"gate": torch.zeros(2, 8)}
    assert torch.equal(gated_residual_adaln(**inputs)[0], inputs["x"])


@each_op
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (6, 8), r"x must be \[B, T, D\], got \[6, 8\]"),
        ("weight", (7,), r"weight must be \[8\], got \[7\]"),
        ("shift", (3, 8), r"shift must be \[2, 8\], got \[3, 8\]"),
        ("scale", (2, 1, 8), r"scale must be \[2, 8\], got \[2, 1, 8\]"),
    ],
)
def test_mismatched_shapes_are_refused(op, name, shape, message, draw):
    with pytest.raises(ValueError, match=f"{op.__name__}: {message}"):
        op(**arguments(op, draw, 2, 3, 8) | {name: draw(*shape)})


@each_gated_op
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("branch_bias", (7,), r"branch_bias must be \[8\], got \[7\]"),
        ("branch", (2, 1, 8), r"branch must be \[2, 3, 8\] like x, got \[2, 1, 8\]"),
        ("gate", (8,), r"gate must be \[2, 8\], got \[8\]"),
    ],
)
def test_mismatched_branches_and_gates_are_refused(op, name, shape, message, draw):
    with pytest.raises(ValueError, match=f"{op.__name__}: {message}"):
        op(**arguments(op, draw, 2, 3, 8) | {name: draw(*shape)})


def test_a_mismatched_norm_weight_is_refused(draw):
    with pytest.raises(ValueError, match=r"gated_residual_norm_adaln: norm_weight must be \[8\]"):
        gated_residual_norm_adaln(**arguments(gated_residual_norm_adaln, draw, 2, 3, 8) | {"norm_weight": draw(1, 8)})


@fast_backends
def test_other_modulation_dtypes_are_read_as_float32(backend_name, draw):
    x, weight = draw(2, 5, 8), draw(8)
    shift, scale = draw(2, 8).half().requires_grad_(), draw(2, 8).half().requires_grad_()
    actual = adaln_modulate(x, weight, shift, scale)
    expected = adaln_modulate(x, weight, shift.float(), scale.float())
    assert torch.equal(actual, expected)
    assert torch.autograd.grad(actual.sum(), shift)[0].dtype == torch.float16
