import pytest
import torch

from unite_fast.kernels import swiglu
from unite_fast.kernels.swiglu import swiglu_ref

fast_backends = pytest.mark.parametrize("backend_name", ["native", "triton"], indirect=True)
native_only = pytest.mark.parametrize("backend_name", ["native"], indirect=True)


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


def test_large_inputs_give_finite_outputs():
    out = swiglu(torch.tensor([[-200.0, 200.0, 1.0, 1.0]]))
    assert out.tolist() == [[pytest.approx(0.0, abs=1e-30), 200.0]]


def test_an_odd_width_is_refused(draw):
    with pytest.raises(ValueError, match="swiglu: the last dimension must be even, got 7"):
        swiglu(draw(2, 7))


@pytest.mark.parametrize("backend_name", ["reference", "native", "triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_bias_that_uw_contains(backend_name, dtype, judge, draw):
    """More rows than a program of the Triton backend takes, and more columns than it takes at once."""

    def containing(uw, uw_bias):
        return formula(uw + (uw_bias - uw_bias.detach()))

    judge(swiglu, containing, {"uw": draw(2, 67, 30, dtype=dtype), "uw_bias": draw(30)}, (dtype,))
    judge(swiglu, containing, {"uw": draw(3, 520, dtype=dtype), "uw_bias": draw(520)}, (dtype,))


def test_a_bias_of_another_width_is_refused(draw):
    with pytest.raises(ValueError, match=r"swiglu: uw_bias must be \[8\], got \[4\]"):
        swiglu(draw(2, 8), draw(4))


@native_only
def test_silu_is_exact_to_3_units_in_the_last_place(backend_name):
    """C++ has its own exp. Where silu(u) is a normal float32, exp, sum and division add at most one unit each. Measured
    on this grid: 1.6."""
    u = torch.linspace(-80, 100, 400_001)
    actual = swiglu(torch.stack((u, torch.ones_like(u)), dim=-1))[:, 0].double()
    expected = u.double() * torch.sigmoid(u.double())
    assert ((actual - expected).abs() <= 3 * 2.0**-23 * expected.abs()).all()


@fast_backends
def test_silu_of_very_large_inputs(backend_name, device):
    u = torch.tensor([-3e38, -1e4, -90.0, 90.0, 1e4, 3e38], device=device)
    actual = swiglu(torch.stack((u, torch.ones_like(u)), dim=-1))[:, 0]
    # The exp of the C++ backend is at least about 2^-126, so a negative result is that small fraction of u, not zero.
    assert (actual[:3].abs() <= 2.0**-125 * u[:3].abs()).all() and torch.equal(actual[3:], u[3:])
