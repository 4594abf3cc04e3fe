import math

import pytest
import torch

from unite_fast.kernels import gelu
from unite_fast.kernels.gelu import gelu_ref

fast_backends = pytest.mark.parametrize("backend_name", ["native", "triton"], indirect=True)


def formula(u):
    return u * 0.5 * (1 + torch.erf(u / math.sqrt(2)))


@pytest.mark.parametrize("op", [gelu, gelu_ref])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 41, 246), (2, 16, 340), (7, 3)])
def test_output_and_gradient_against_float64(op, dtype, shape, judge, draw):
    judge(op, formula, {"u": 2 * draw(*shape, dtype=dtype)}, (dtype,))


@fast_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_shared_bias(backend_name, dtype, judge, draw):
    judge(gelu, formula, {"u": 2 * draw(3, 67, 30, dtype=dtype)}, (dtype,))


@fast_backends
def test_very_large_inputs(backend_name, device):
    # Not 3e38: PyTorch's own GELU doubles it on a CPU with AVX-512, which is infinite.
    u = torch.tensor([-1e38, -1e4, -90.0, 0.0, 90.0, 1e4, 1e38], device=device, requires_grad=True)
    out = gelu(u)
    assert out.tolist() == [0.0, 0.0, 0.0, *u.tolist()[3:]]
    assert torch.autograd.grad(out.sum(), u)[0].tolist() == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]


def test_a_bias_of_another_width_is_refused(draw):
    with pytest.raises(ValueError, match=r"gelu: u_bias must be \[7\], got \[8\]"):
        gelu(draw(2, 7), draw(8))
