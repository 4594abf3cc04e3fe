"""Philox in Triton against PyTorch and C++: equal words and uniforms, and normals within 2 units in the last place."""

import pytest
import torch

from unite_fast.kernels import backend
from unite_fast.randomness import Philox, Stream, at_step

WORD = 2**32 - 1
UNITS = 2
"""Largest difference of normals, in units in the last place: the float64 functions come from different libraries."""
KEYS = [(0, 0), (2**31, 2**31 - 1), (2**32 + 5, 2**31), (2**64 - 1, WORD)]
"""Seed and step: with and without the high bit of each word."""
POSITIONS = [0, 5, 2**31 - 1, 2**31, WORD]
DRAWS = [range(1), range(3), range(2**15 - 1, 2**15 + 1), range(2**16 - 2, 2**16)]
SHAPES = [(), (3,), (4,), (5, 7), (2, 513), (1024,), (1, 1031)]
"""Part of a block, whole blocks, more than one program; the last has an odd remainder."""


@pytest.fixture(autouse=True)
def triton():
    if missing := backend.why_missing("triton"):
        pytest.skip(missing)


@pytest.fixture
def device():
    return "cpu" if backend.interpreted() else "cuda"


def draw(backend_name, philox, kind, *arguments):
    with backend.using(backend_name):
        assert philox.on_triton == (backend_name == "triton")
        return getattr(philox, kind)(*arguments).cpu()


@pytest.mark.parametrize("kind", ["words", "uniform", "normal"])
@pytest.mark.parametrize(("seed", "step"), KEYS)
def test_words_and_uniforms_equal_the_reference_and_normals_nearly(kind, seed, step, device):
    philox = Philox(seed, step, torch.tensor(POSITIONS, device=device))
    for stream, shape, draws in [
        *((Stream.FLOW_TIME, shape, range(1)) for shape in SHAPES),
        *((Stream.LABEL_DROP, (3,), draws) for draws in DRAWS),
        (Stream.EPOCH_ORDER, (2, 5), 2**16 - 1),
    ]:
        actual = draw("triton", philox, kind, stream, shape, draws)
        for backend_name in ("reference", "auto") if device == "cpu" else ("reference",):
            expected = draw(backend_name, philox, kind, stream, shape, draws)
            assert actual.dtype == expected.dtype
            assert actual.shape == expected.shape
            if kind == "normal":
                units = (
                    (actual.double() - expected.double()).abs()
                    / torch.finfo(torch.float32).eps
                    / expected.double().abs()
                )
                assert units.max() <= UNITS
            else:
                assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", ["words", "uniform", "normal"])
def test_a_step_in_the_positions_is_a_step(kind, device):
    positions = torch.tensor(POSITIONS, device=device)
    for step in (1, 2**31 - 1):
        expected = draw("triton", Philox(9, step, positions), kind, Stream.FLIP, (5,))
        assert torch.equal(draw("triton", Philox(9, 0, at_step(positions, step)), kind, Stream.FLIP, (5,)), expected)


def test_many_samples_and_programs(device):
    """Blocks are numbered across samples, so programs begin and end within a sample."""
    philox = Philox(2**40 + 9, 3, 7 * torch.arange(700, device=device))
    for shape in ((), (6,)):
        expected = draw("reference", philox, "uniform", Stream.RECON_TIME, shape, range(2))
        assert torch.equal(draw("triton", philox, "uniform", Stream.RECON_TIME, shape, range(2)), expected)


def test_strided_positions(device):
    philox = Philox(1, 2, torch.arange(10, device=device)[::3])
    expected = draw("reference", philox, "words", Stream.FLIP, (5,))
    assert torch.equal(draw("triton", philox, "words", Stream.FLIP, (5,)), expected)


def test_an_empty_draw(device):
    for positions, shape in ((torch.arange(0), (3,)), (torch.arange(2), (0,))):
        actual = draw("triton", Philox(0, 0, positions.to(device)), "uniform", Stream.FLIP, shape)
        assert actual.shape == (len(positions), *shape)
