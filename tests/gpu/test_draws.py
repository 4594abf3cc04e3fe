"""Random draws on a GPU have the same bits as in plain PyTorch on a CPU."""

import pytest
import torch

from unite_fast import kernels
from unite_fast.kernels import backend
from unite_fast.kernels.tap_distance import dropout_mask
from unite_fast.randomness import Philox, Stream

pytestmark = pytest.mark.gpu

KEYS = [(0, 0), (2**40 + 9, 77), (2**63 + 12345, 2**32 - 1)]
"""Seed and step: both words of the seed, and the top bits."""
UNITS = 1
"""Largest difference of normals, in units in the last place. A GPU's float64 functions may round the other way once in
10^8."""


@pytest.fixture(params=KEYS)
def philox(request, device):
    """The same keys on the device and on the CPU."""
    positions = 2**31 - 2 + torch.arange(5)  # across the sign bit of 32 bits
    return Philox(*request.param, positions.to(device)), Philox(*request.param, positions)


@pytest.fixture
def cpu_draw():
    """Draws on the CPU in plain PyTorch, which computes in float64 where the definition does."""

    def run(philox, name, *arguments, **options):
        with backend.using("reference"):
            return getattr(philox, name)(*arguments, **options)

    return run


@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (256, 32)])
@pytest.mark.parametrize("kind", ["words", "uniform"])
@pytest.mark.parametrize("draw_index", [0, 2**16 - 1])
def test_words_and_uniforms_equal_the_cpu_s(philox, kind, shape, draw_index, cpu_draw):
    on_device, on_cpu = philox
    actual = getattr(on_device, kind)(Stream.LABEL_DROP, shape, draw=draw_index)
    expected = cpu_draw(on_cpu, kind, Stream.LABEL_DROP, shape, draw=draw_index)
    assert actual.dtype == expected.dtype and actual.device == on_device.positions.device
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("shape", [(), (5,), (256, 32)])
def test_normals_nearly_equal_the_cpu_s(philox, shape, cpu_draw, record_property):
    on_device, on_cpu = philox
    actual = on_device.normal(Stream.REGISTERS, shape).cpu()
    expected = cpu_draw(on_cpu, "normal", Stream.REGISTERS, shape)
    difference = (actual.view(torch.int32).long() - expected.view(torch.int32).long()).abs()
    record_property("units apart", int(difference.max()))
    assert actual.dtype == expected.dtype == torch.float32
    assert difference.max() <= UNITS and (difference > 0).sum() <= 2


@pytest.mark.parametrize("channels", [64, 96, 128, 512])
def test_the_dropout_in_a_kernel_has_the_cpu_s_bits(philox, channels, cpu_draw, on_cuda):
    """Where all features are 1 and x is 0, the gradient of a channel is above the mean if dropout keeps it."""
    if not on_cuda:
        pytest.skip("tap_distance has no C++ backend")
    on_device, on_cpu = philox
    with backend.using("reference"):
        mask = dropout_mask(on_cpu, Stream.LPIPS_DROPOUT, 3, (channels, 17, 9))
    y = torch.ones(mask.shape, device=on_device.positions.device).requires_grad_()
    weight = torch.ones(channels, device=y.device)
    tap = kernels.tap_distance(y, torch.zeros_like(y), weight, None, on_device, Stream.LPIPS_DROPOUT, 3, pool=False)
    (gradient,) = torch.autograd.grad(tap.distance.sum(), y)
    assert torch.equal((gradient > gradient.mean(1, keepdim=True)).cpu(), mask > 0)
