"""The Triton backend of tap_distance against the reference, which tests/test_lpips.py compares with the formula."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from unite_fast import kernels
from unite_fast.kernels import backend
from unite_fast.kernels.tap_distance import tap_distance_op, tap_distance_ref

SHAPES = [(2, 32, 5, 7), (7, 40, 1, 1), (3, 128, 17, 9), (2, 512, 3, 3)]
"""Odd sides, a number of channels that is no power of two, several programs per image."""


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
def make_inputs(draw, device):
    def make(shape, dtype=torch.float32, masked=True):
        y, x = (torch.relu(draw(*shape)).to(device, dtype, memory_format=torch.channels_last) for _ in range(2))
        mask = (2 * (draw(*shape) > 0)).to(device, torch.uint8, memory_format=torch.channels_last) if masked else None
        return y, x, draw(shape[1]).abs().to(device), mask

    return make


def run(op, y, x, weight, mask, dtype=None):
    y = y.detach().to(dtype or y.dtype).requires_grad_()
    x, weight = (v.to(dtype or v.dtype) for v in (x, weight))
    out = op(y, x, weight, mask)
    (gradient,) = torch.autograd.grad(out, y, torch.linspace(0.5, 2, len(out), device=out.device, dtype=out.dtype))
    return out.detach(), gradient


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(make_inputs, shape, dtype, masked):
    inputs = make_inputs(shape, dtype, masked)
    truth = run(tap_distance_ref, *inputs, dtype=torch.float64)
    plain, ours = run(tap_distance_ref, *inputs), run(kernels.tap_distance, *inputs)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    for expected, other, mine in zip(truth, plain, ours, strict=True):
        rounding = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}[mine.dtype]
        allowed = 2 * (other.double() - expected).norm() + rounding * expected.norm()
        assert (mine.double() - expected).norm() <= allowed


def test_pixels_of_zeros_have_no_gradient_and_no_nan(make_inputs):
    y, x, weight, mask = make_inputs((2, 32, 4, 4))
    y[:, :, 1] = 0
    x[:, :, 2] = 0
    x[0, :, 1, 3] = 0
    out, gradient = run(kernels.tap_distance, y, x, weight, mask)
    expected = run(tap_distance_ref, y, x, weight, mask)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(gradient, expected[1])
    assert gradient.isfinite().all()


def test_any_layout_gives_the_same_bits(make_inputs):
    y, x, weight, mask = make_inputs((2, 32, 5, 6))
    expected = run(kernels.tap_distance, y, x, weight, mask)
    for actual in (
        run(kernels.tap_distance, *(v.contiguous() for v in (y, x)), weight, mask.contiguous()),
        run(kernels.tap_distance, y, x, weight, mask.float()),
        run(kernels.tap_distance, y, x, weight, mask),
    ):
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_only_the_inputs_are_saved_for_backward(make_inputs):
    y, x, weight, mask = make_inputs((2, 32, 5, 6), torch.bfloat16)
    saved = set()
    y.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.add(v.data_ptr()) or v, lambda v: v):
        kernels.tap_distance(y, x, weight, mask)
    assert saved == {v.data_ptr() for v in (y, x, weight, mask)}


@pytest.mark.parametrize("masked", [True, False])
def test_fakes_match_the_backend(make_inputs, masked):
    y, x, weight, mask = make_inputs((2, 32, 5, 6), torch.bfloat16, masked)
    outputs = tap_distance_op.backends["triton"].forward(y, x, weight, mask)
    gradients = tap_distance_op.backends["triton"].backward(torch.ones_like(outputs[0]), y, x, weight, mask)
    with FakeTensorMode() as mode:
        fakes = [None if v is None else mode.from_tensor(v) for v in (y, x, weight, mask)]
        fake = tap_distance_op.op(*fakes)
        fake_gradient = tap_distance_op.backward_op(torch.empty(2), *fakes)
    for a, b in ((outputs[0], fake), (gradients[0], fake_gradient)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 5)}, r"x must be \[2, 3, 4, 4\], got \[2, 3, 4, 5\]"),
        ({"weight": torch.zeros(4)}, r"weight must be \[3\], got \[4\]"),
        ({"weight": torch.zeros(3, requires_grad=True)}, "weight gets no gradient; detach it"),
        ({"mask": torch.zeros(1, 3, 4, 4)}, r"mask must be \[2, 3, 4, 4\], got \[1, 3, 4, 4\]"),
        ({"y": torch.zeros(2, 3)}, r"y must be \[B, C, H, W\]"),
    ],
)
def test_invalid_arguments_are_refused(wrong, message):
    valid = {"y": torch.zeros(2, 3, 4, 4), "x": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(3), "mask": None}
    with pytest.raises(ValueError, match=f"tap_distance: {message}"):
        kernels.tap_distance(**valid | wrong)
