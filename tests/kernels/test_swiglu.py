import pytest
import torch

from unite_fast.kernels import swiglu
from unite_fast.kernels.swiglu import swiglu_ref


def formula(uw):
    half = uw.shape[-1] // 2
    u, w = uw[..., :half], uw[..., half:]
    return u / (1 + torch.exp(-u)) * w


@pytest.mark.parametrize("op", [swiglu, swiglu_ref])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 41, 246), (2, 16, 340), (7, 2)])
def test_output_and_gradient_against_float64(op, dtype, shape, judge, draw):
    judge(op, formula, {"uw": draw(*shape, dtype=dtype)}, (dtype,))


def test_strided_input(judge, draw):
    judge(swiglu, formula, {"uw": draw(4, 9, 20)[:, ::2]}, (torch.float32,))


def test_far_out_inputs_stay_finite():
    out = swiglu(torch.tensor([[-200.0, 200.0, 1.0, 1.0]]))
    assert out.tolist() == [[pytest.approx(0.0, abs=1e-30), 200.0]]


def test_an_odd_width_is_refused(draw):
    with pytest.raises(ValueError, match="swiglu: the last dimension must be even, got 7"):
        swiglu(draw(2, 7))
