"""Philox against its published answers and integer arithmetic; draws against numpy in float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from unite_fast.kernels import backend, native
from unite_fast.randomness import Philox, Stream, at_step, box_muller, permutation, philox4x32

# Random123's kat_vectors, "philox4x32 10": counter, key, answer.
KNOWN_ANSWERS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)

# Bound on an estimate from a fixed seed. A fault exceeds it by far; chance would once in 1.7 million.
SIGMAS = 5

WORD = 2**32 - 1


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_by_integers(counter: list[int], key: list[int]) -> list[int]:
    """The paper's rounds, in Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        product_0, product_1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (product_1 >> 32) ^ c1 ^ k0, product_1 & WORD, (product_0 >> 32) ^ c3 ^ k1, product_0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


class FixedWords(Philox):
    """Draws from fixed words."""

    def _words(self, stream, elements, draw):
        return torch.tensor([[0, 0, WORD, WORD, 0, WORD, WORD, 0]])[:, :elements]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox4x32_10_gives_the_published_answers(counter, key, answer):
    words = philox4x32(torch.tensor([words_of(counter)]), tuple(words_of(key)))
    assert words.tolist() == [words_of(answer)]


@pytest.mark.parametrize(("seed", "step", "draw"), [(0, 0, 0), (123456789, 7, 2), (2**64 - 1, WORD, 2**16 - 1)])
def test_the_counter_holds_element_position_step_stream_and_draw(seed, step, draw):
    positions = [0, 3, WORD]
    actual = Philox(seed, step, torch.tensor(positions)).words(Stream.FLOW_NOISE, (2, 3), draw)
    for position, words in zip(positions, actual.flatten(1).tolist(), strict=True):
        expected = []
        for block in range(2):
            counter = [block, position, step, Stream.FLOW_NOISE * 2**16 + draw]
            expected += philox_by_integers(counter, [seed & WORD, seed >> 32])
        assert words == expected[:6]


def test_the_numbers_of_streams_never_change():
    """They are part of a run's definition."""
    names = (
        "REGISTERS RECON_TIME DECODER_NOISE_MASK DECODER_NOISE DECODER_NOISE_TIME FLOW_TIME FLOW_NOISE LABEL_DROP FLIP "
        "LPIPS_DROPOUT SAMPLE_NOISE EPOCH_ORDER"
    )
    assert [stream.name for stream in sorted(Stream)][:12] == names.split()
    assert sorted(Stream) == list(range(len(Stream)))


def test_a_uniform_is_never_0_or_1():
    uniform = FixedWords(0, 0, torch.tensor([0])).uniform(Stream.FLIP, (8,))
    assert uniform.dtype == torch.float32
    assert uniform.unique().tolist() == [2.0**-24, 1 - 2.0**-24]


def test_normals_of_extreme_words_are_finite():
    normal = box_muller(torch.tensor([[0, 0], [WORD, WORD], [0, WORD], [WORD, 0]]))
    assert normal.dtype == torch.float32
    assert normal.isfinite().all()
    assert normal.abs().max() < 6.8  # sqrt(-2 log 2^-33)


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_normals_agree_with_box_muller_in_float64(name):
    philox = Philox(5, 6, torch.arange(7))
    with backend.using(name):
        actual = philox.normal(Stream.REGISTERS, (33, 3)).flatten(1).numpy()
    words = philox.words(Stream.REGISTERS, (100,)).numpy().astype(np.float64)  # 99, padded to whole blocks
    radius = np.sqrt(-2 * np.log((words[:, 0::2] + 0.5) / 2**32))
    angle = 2 * np.pi * words[:, 1::2] / 2**32
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(7, 100)[:, :99]
    units = np.abs(actual - expected) / np.spacing(np.abs(expected).astype(np.float32))
    assert actual.dtype == np.float32
    # Half a unit for rounding to float32; the rest because another library computed the float64 functions.
    assert units.max() < 0.5 + 1e-6


@pytest.mark.parametrize(
    ("kind", "moments"),
    [
        # order -> (mean of x^order, variance of x^order)
        ("normal", {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}),
        ("uniform", {1: (1 / 2, 1 / 12), 2: (1 / 3, 4 / 45), 3: (1 / 4, 9 / 112)}),
    ],
)
def test_moments_of_the_draws(kind, moments):
    philox = Philox(11, 0, torch.arange(200))
    x = getattr(philox, kind)(Stream.FLOW_NOISE, (1000,)).double()
    for order, (mean, variance) in moments.items():
        assert abs(x.pow(order).mean() - mean) < SIGMAS * math.sqrt(variance / x.numel()), f"moment {order}"


@pytest.mark.parametrize("axis", [0, 1])
def test_neighbouring_samples_and_elements_are_uncorrelated(axis):
    x = Philox(12, 0, torch.arange(400)).normal(Stream.FLOW_NOISE, (400,)).double()
    products = x.narrow(axis, 0, 399) * x.narrow(axis, 1, 399)
    assert abs(products.mean()) < SIGMAS / math.sqrt(products.numel())


@pytest.mark.parametrize("kind", ["words", "uniform", "normal"])
def test_a_draw_does_not_depend_on_its_batch(kind):
    def draw(positions):
        return getattr(Philox(3, 4, positions), kind)(Stream.FLOW_NOISE, (5, 3), 1)

    whole = draw(torch.arange(12))
    assert torch.equal(torch.cat([draw(part) for part in torch.arange(12).split([1, 4, 7])]), whole)
    shuffled = torch.tensor([7, 2, 11])
    assert torch.equal(draw(shuffled), whole[shuffled])


def test_more_elements_do_not_change_the_first_ones():
    philox = Philox(3, 4, torch.arange(2))
    assert torch.equal(philox.normal(Stream.REGISTERS, (5,)), philox.normal(Stream.REGISTERS, (64,))[:, :5])


@pytest.mark.parametrize("kind", ["words", "uniform", "normal"])
def test_a_range_of_draws_is_a_stack_of_draws(kind):
    draw = getattr(Philox(2**63 + 5, 7, torch.tensor([9, 2**31 + 1])), kind)
    actual = draw(Stream.FLOW_TIME, (3,), range(2, 5))
    assert torch.equal(actual, torch.stack([draw(Stream.FLOW_TIME, (3,), f) for f in (2, 3, 4)]))
    assert draw(Stream.FLOW_TIME, draw=range(1)).shape == (1, 2)


@pytest.mark.parametrize(
    ("philox", "draw"),
    [
        (Philox(2**64, 0, torch.arange(1)), 0),
        (Philox(0, 2**32, torch.arange(1)), 0),
        (Philox(0, 0, torch.arange(1)), 2**16),
        (Philox(0, 0, torch.arange(1)), range(2**16 - 1, 2**16 + 1)),
        (Philox(0, 0, torch.arange(1)), range(0, 4, 2)),
        (Philox(0, 0, torch.arange(1)), range(0)),
        (Philox(0, 0, torch.arange(1)), -1),
    ],
)
def test_keys_out_of_range_are_refused(philox, draw):
    with pytest.raises(ValueError, match="Philox: "):
        philox.uniform(Stream.FLIP, draw=draw)


def test_streams_draws_steps_seeds_and_samples_differ():
    def draw(seed=0, step=0, position=0, stream=Stream.FLOW_NOISE, draw=0):
        return Philox(seed, step, torch.tensor([position])).words(stream, (64,), draw).flatten()

    draws = [
        draw(),
        draw(seed=1),
        draw(seed=2**32),
        draw(step=1),
        draw(position=1),
        draw(stream=Stream.REGISTERS),
        draw(draw=1),
    ]
    for a, b in itertools.combinations(draws, 2):
        assert not (a == b).any()


@pytest.mark.parametrize("kind", ["words", "uniform", "normal"])
@pytest.mark.parametrize("words", ["PyTorch", "C++"])
def test_a_step_in_the_positions_is_a_step(kind, words, monkeypatch):
    """What a CUDA graph relies on: the step is in a tensor."""
    if words == "PyTorch":
        monkeypatch.setattr(native, "available", lambda: False)
    positions = torch.tensor([0, 5, 2**31, 2**32 - 1])
    for step in (0, 1, 77, 2**31 - 1):
        expected, actual, halves = (
            getattr(philox, kind)(Stream.FLOW_NOISE, (7,), range(2))
            for philox in (
                Philox(9, step, positions),
                Philox(9, 0, at_step(positions, step)),
                Philox(9, step // 2, at_step(positions, step - step // 2)),
            )
        )
        assert torch.equal(actual, expected) and torch.equal(halves, expected)
    with pytest.raises(ValueError, match="step -1 must be"):
        at_step(positions, -1)


def test_a_scalar_draw_has_one_number_per_sample():
    philox = Philox(0, 0, torch.arange(3))
    assert philox.uniform(Stream.RECON_TIME).shape == (3,)
    assert philox.normal(Stream.FLOW_TIME).shape == (3,)


@pytest.mark.parametrize("length", [0, 1, 2, 1797])
def test_an_epoch_visits_each_sample_once(length):
    order = permutation(seed=1, epoch=2, length=length)
    assert order.sort().values.tolist() == list(range(length))


def test_epochs_and_seeds_differ_and_repeat():
    orders = [permutation(seed, epoch, 100) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).sum() < 10  # one agreement is expected
    assert torch.equal(orders[1], permutation(0, 1, 100))


def test_every_sample_is_equally_likely_at_every_position():
    orders = torch.stack([permutation(0, epoch, 5) for epoch in range(1000)])
    counts = torch.stack([(orders == sample).sum(0) for sample in range(5)])
    assert (counts - 200).abs().max() < SIGMAS * math.sqrt(1000 * 0.2 * 0.8)
