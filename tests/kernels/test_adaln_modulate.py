import pytest
import torch

from unite_fast.kernels import adaln_modulate
from unite_fast.kernels.adaln_modulate import adaln_modulate_ref

# dtype of x and of the modulation. Autocast gives a float32 residual and a bfloat16 modulation.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


def formula(x, weight, shift, scale):
    normed = x / torch.sqrt((x * x).mean(dim=2, keepdim=True) + 1e-6) * weight
    return normed * (1 + scale[:, None, :]) + shift[:, None, :]


def arguments(draw, b, t, d, x_dtype=torch.float32, modulation_dtype=torch.float32):
    return {
        "x": 3 * draw(b, t, d, dtype=x_dtype),
        "weight": draw(d, around=1.0),
        "shift": draw(b, d, dtype=modulation_dtype),
        "scale": draw(b, d, dtype=modulation_dtype),
    }


@pytest.mark.parametrize("op", [adaln_modulate, adaln_modulate_ref])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(5, 41, 123), (2, 20, 64)])
def test_output_and_gradients_against_float64(op, dtypes, shape, judge, draw):
    judge(op, formula, arguments(draw, *shape, *dtypes), (dtypes[0],))


def test_the_matrix_products_dtype_can_be_asked_for(judge, draw):
    def to_bfloat16(*inputs):
        return adaln_modulate(*inputs, out_dtype=torch.bfloat16)

    judge(to_bfloat16, formula, arguments(draw, 3, 8, 32), (torch.bfloat16,))


def test_strided_inputs(judge, draw):
    whole = arguments(draw, 4, 18, 32)
    shift, scale = draw(4, 64).chunk(2, dim=-1)
    judge(
        adaln_modulate, formula, {**whole, "x": whole["x"][:, 1::2], "shift": shift, "scale": scale}, (torch.float32,)
    )


def test_a_token_of_zeros_gives_the_shift(draw):
    given = arguments(draw, 2, 3, 8) | {"x": torch.zeros(2, 3, 8)}
    assert torch.equal(adaln_modulate(**given), given["shift"][:, None].expand(2, 3, 8))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (6, 8), r"x must be \[B, T, D\], got \[6, 8\]"),
        ("weight", (7,), r"weight must be \[8\], got \[7\]"),
        ("shift", (3, 8), r"shift must be \[2, 8\], got \[3, 8\]"),
        ("scale", (2, 1, 8), r"scale must be \[2, 8\], got \[2, 1, 8\]"),
    ],
)
def test_shapes_that_do_not_belong_together(name, shape, message, draw):
    with pytest.raises(ValueError, match=f"adaln_modulate: {message}"):
        adaln_modulate(**arguments(draw, 2, 3, 8) | {name: draw(*shape)})
