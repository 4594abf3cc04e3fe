import pytest
import torch

from unite_fast.kernels import gated_residual_norm_adaln
from unite_fast.kernels.gated_residual_norm_adaln import gated_residual_norm_adaln_ref

# dtype of the residual, of the branch and of the modulation. The second line is training under autocast.
DTYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
]

ROUNDINGS = 3
"""To bfloat16, between input and output or input and gradient: of the result, of a bfloat16 residual's new value and of
its gradient."""


def formula(x, branch, gate, norm_weight, weight, shift, scale):
    def norm(y, w):
        return y / torch.sqrt((y * y).mean(dim=2, keepdim=True) + 1e-6) * w

    new = norm(x + gate[:, None, :] * branch, norm_weight).to(x.dtype)
    return new, norm(new, weight) * (1 + scale[:, None, :]) + shift[:, None, :]


def arguments(draw, b, t, d, x_dtype=torch.float32, branch_dtype=torch.float32, modulation_dtype=torch.float32):
    return {
        "x": draw(b, t, d, dtype=x_dtype),
        "branch": draw(b, t, d, dtype=branch_dtype),
        "gate": draw(b, d, dtype=modulation_dtype),
        "norm_weight": draw(d, around=1.0),
        "weight": draw(d, around=1.0),
        "shift": draw(b, d, dtype=modulation_dtype),
        "scale": draw(b, d, dtype=modulation_dtype),
    }


@pytest.mark.parametrize("op", [gated_residual_norm_adaln, gated_residual_norm_adaln_ref])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(5, 41, 123), (2, 20, 64)])
def test_outputs_and_gradients_against_float64(op, dtypes, shape, judge, draw):
    judge(
        op,
        formula,
        arguments(draw, *shape, *dtypes),
        (dtypes[0], dtypes[0]),
        ROUNDINGS if dtypes[0] == torch.bfloat16 else 1,
    )


def test_only_the_modulated_output_takes_the_asked_dtype(judge, draw):
    def to_bfloat16(*inputs):
        return gated_residual_norm_adaln(*inputs, out_dtype=torch.bfloat16)

    judge(to_bfloat16, formula, arguments(draw, 3, 8, 32), (torch.float32, torch.bfloat16))


def test_strided_inputs(judge, draw):
    gate, shift, scale = draw(4, 96).chunk(3, dim=-1)
    given = arguments(draw, 4, 18, 32) | {"gate": gate, "shift": shift, "scale": scale}
    given |= {"x": given["x"][:, :9], "branch": given["branch"][:, ::2]}
    judge(gated_residual_norm_adaln, formula, given, (torch.float32, torch.float32))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (6, 8), r"x must be \[B, T, D\]"),
        ("branch", (2, 1, 8), r"branch must be \[2, 3, 8\] like x"),
        ("gate", (8,), r"gate must be \[2, 8\]"),
        ("norm_weight", (1, 8), r"norm_weight must be \[8\]"),
        ("weight", (7,), r"weight must be \[8\]"),
        ("shift", (3, 8), r"shift must be \[2, 8\]"),
        ("scale", (2, 16), r"scale must be \[2, 8\]"),
    ],
)
def test_shapes_that_do_not_belong_together(name, shape, message, draw):
    with pytest.raises(ValueError, match=f"gated_residual_norm_adaln: {message}"):
        gated_residual_norm_adaln(**arguments(draw, 2, 3, 8) | {name: draw(*shape)})
