"""Random draws: on a GPU the same bits as on a CPU in plain PyTorch."""

import pytest
import torch

from unite_fast.kernels import backend
from unite_fast.lpips import dropout_masks, tap_shapes
from unite_fast.randomness import Philox, Stream

pytestmark = pytest.mark.gpu

KEYS = [(0, 0), (2**40 + 9, 77), (2**63 + 12345, 2**32 - 1)]
"""Seed and step: both words of the seed, the top bits."""
UNITS = 1
"""Of the last place, in normals: a GPU's float64 functions may round the other way once in 10^8."""


@pytest.fixture(params=KEYS)
def philox(request, device):
    """The same draws on the device and, in plain PyTorch, on the CPU."""
    positions = 2**31 - 2 + torch.arange(5)  # across the sign bit of 32 bits
    return Philox(*request.param, positions.to(device)), Philox(*request.param, positions)


@pytest.fixture
def plain():
    """A CPU's draws in plain PyTorch, in float64 where the definition has it."""

    def run(philox, name, *arguments, **options):
        with backend.using("reference"):
            return getattr(philox, name)(*arguments, **options)

    return run


@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (256, 32)])
@pytest.mark.parametrize("way", ["words", "uniform"])
@pytest.mark.parametrize("number", [0, 2**16 - 1])
def test_words_and_uniforms_bit_for_bit(philox, way, shape, number, plain):
    here, there = philox
    got = getattr(here, way)(Stream.LABEL_DROP, shape, draw=number)
    want = plain(there, way, Stream.LABEL_DROP, shape, draw=number)
    assert got.dtype == want.dtype and got.device == here.positions.device
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("shape", [(), (5,), (256, 32)])
def test_normals(philox, shape, plain, record_property):
    here, there = philox
    got, want = here.normal(Stream.REGISTERS, shape).cpu(), plain(there, "normal", Stream.REGISTERS, shape)
    apart = (got.view(torch.int32).long() - want.view(torch.int32).long()).abs()
    record_property("units apart", int(apart.max()))
    assert got.dtype == want.dtype == torch.float32
    assert apart.max() <= UNITS and (apart > 0).sum() <= 2


def test_masks_bit_for_bit(philox, sized, plain):
    here, there = philox
    shapes = tap_shapes(*sized((256, 256), (32, 32)))
    with backend.using("reference"):
        want = dropout_masks(there, shapes)
    got = dropout_masks(here, shapes)
    for mine, other in zip(got, want, strict=True):
        assert (mine.dtype, mine.stride()) == (other.dtype, other.stride())
        assert torch.equal(mine.cpu(), other)
