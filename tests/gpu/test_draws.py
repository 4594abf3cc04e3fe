"""Random draws on a GPU have the same bits as in plain PyTorch on a CPU."""

import pytest
import torch

from unite_fast.kernels import backend
from unite_fast.lpips import dropout_masks, tap_shapes
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


def test_dropout_masks_equal_the_cpu_s(philox, size_for_device, cpu_draw):
    on_device, on_cpu = philox
    shapes = tap_shapes(*size_for_device((256, 256), (32, 32)))
    with backend.using("reference"):
        expected = dropout_masks(on_cpu, shapes)
    actual = dropout_masks(on_device, shapes)
    for mask, expected_mask in zip(actual, expected, strict=True):
        assert (mask.dtype, mask.stride()) == (expected_mask.dtype, expected_mask.stride())
        assert torch.equal(mask.cpu(), expected_mask)
