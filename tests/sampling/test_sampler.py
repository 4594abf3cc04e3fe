"""Guidance on a stand-in that records its calls; images of a small model."""

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from unite_fast.config import SamplingConfig
from unite_fast.errors import UserError
from unite_fast.randomness import Philox, Stream
from unite_fast.sampling.sampler import (
    GuidedPrediction,
    Network,
    NonFinite,
    choose_labels,
    finished,
    reconstruct,
    sample_batch,
    sample_images,
    sample_latents,
    smooth_segments,
    solve,
    to_uint8,
)

NO_CLASS = 5


class Recorder:
    """Stands in for UNITE: predicts label + 1 everywhere, ten times that after the norm, and records each call."""

    def __init__(self):
        self.config = SimpleNamespace(num_classes=NO_CLASS, modality="images")
        self.calls: list[tuple[str, float, list[int]]] = []
        self.decode = None

    def encoder(self, x, t, labels):
        return self._predict("raw", 1, x, t, labels)

    def denoise(self, x, t, labels):
        return self._predict("normed", 10, x, t, labels)

    def _predict(self, kind, factor, x, t, labels):
        assert t.shape == labels.shape == x.shape[:1]
        assert t.dtype == torch.float32
        self.calls.append((kind, t[0].item(), labels.tolist()))
        return torch.zeros_like(x) + factor * (labels[:, None, None] + 1)


@pytest.mark.parametrize(
    ("solver", "steps", "tolerance"),
    [("euler", 4000, 1e-3), ("heun", 400, 1e-4), ("multistep", 4, 1e-6), ("dopri5", 50, 2e-3)],
)
def test_a_constant_prediction_is_reached_along_a_straight_line(solver, steps, tolerance):
    """With a constant prediction the path is straight until t = 0.95, where 1 - t reaches its floor; from there to the
    end the rest shrinks by exp(-1)."""
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    config = SamplingConfig(solver=solver, steps=steps, guidance=1.0)
    actual = sample_latents(Recorder(), torch.tensor([0, 3]), noise, config)
    z = torch.tensor([10.0, 40.0])[:, None, None]
    expected = z + 0.05 * math.exp(-1) * (noise - z)
    assert ((actual - expected).abs() / expected.abs()).max() < tolerance


def test_the_time_grid_is_shifted_and_runs_from_0_to_1():
    model = Recorder()
    sample_latents(model, torch.tensor([0]), torch.zeros(1, 1, 1), SamplingConfig(solver="heun", steps=4))
    s = [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1]
    assert [t for _, t, _ in model.calls] == pytest.approx([0.5 * x / (1 - 0.5 * x) for x in s])


def predicted(t: float, **settings) -> tuple[float, Recorder]:
    """The guided prediction for label 2."""
    model, config = Recorder(), SamplingConfig(**settings)
    predict = GuidedPrediction(Network.of(model, config.order).denoise, torch.tensor([2]), NO_CLASS, config)
    return predict(t, torch.zeros(1, 1, 1)).item(), model


def test_guidance_moves_away_from_the_prediction_without_label():
    prediction, model = predicted(0.5, guidance=1.5)
    assert prediction == pytest.approx(60 + 1.5 * (30 - 60))
    assert model.calls == [("normed", 0.5, [2, NO_CLASS])]


def test_cfg_first_does_not_normalise():
    prediction, model = predicted(0.5, guidance=1.5, order="cfg_first")
    assert prediction == pytest.approx(6 + 1.5 * (3 - 6))
    assert model.calls == [("raw", 0.5, [2, NO_CLASS])]


@pytest.mark.parametrize(("order", "expected", "kind"), [("norm_first", 30, "normed"), ("cfg_first", 3, "raw")])
def test_without_guidance_there_is_no_second_pass(order, expected, kind):
    prediction, model = predicted(0.5, guidance=1.0, order=order)
    assert prediction == pytest.approx(expected)
    assert model.calls == [(kind, 0.5, [2])]


@pytest.mark.parametrize(
    ("interval", "t", "guided"),
    [
        ((0.25, 0.75), 0.0, False),
        ((0.25, 0.75), 0.25, False),
        ((0.25, 0.75), 0.26, True),
        ((0.25, 0.75), 0.74, True),
        ((0.25, 0.75), 0.75, False),
        ((0.25, 0.75), 1.0, False),
        ((0.0, 0.75), 0.0, True),
        ((0.0, 1.0), 1.0, False),
    ],
)
def test_guidance_acts_inside_its_interval_only(interval, t, guided):
    prediction, model = predicted(t, guidance=2.0, interval=interval)
    assert prediction == pytest.approx(60 + 2 * (30 - 60) if guided else 30)
    assert [labels for _, _, labels in model.calls] == [[2, NO_CLASS] if guided else [2]]


def solved(solver: str, **settings) -> tuple[GuidedPrediction, list[tuple[float, bool]]]:
    """Solve for two samples; also the time of each call, and whether it was guided."""
    model, config = Recorder(), SamplingConfig(solver=solver, guidance=2.0, **settings)
    predict = GuidedPrediction(model.denoise, torch.tensor([0, 1]), NO_CLASS, config)
    solve(predict, torch.zeros(2, 1, 1))
    return predict, [(pytest.approx(t), len(labels) == 4) for _, t, labels in model.calls]


def test_evaluations_count_guided_calls_twice():
    predict, calls = solved("euler", steps=10, interval=(0.3, 0.7))
    assert len(calls) == 10
    assert predict.evaluations == sum(2 if 0.3 < t.expected < 0.7 else 1 for t, _ in calls)


def test_multistep_evaluates_both_sides_of_a_jump_of_guidance():
    predict, calls = solved("multistep", steps=4, interval=(0.3, 0.7))
    assert len(calls) == predict.evaluations - sum(guided for _, guided in calls)
    assert [guided for t, guided in calls if t == 0.3] == [False, True]
    assert [guided for t, guided in calls if t == 0.7] == [True, False]
    assert all(guided == (0.3 < t.expected < 0.7) for t, guided in calls if t not in (0.3, 0.7))


@pytest.mark.parametrize("interval", [(0.1, 1.0), (0.3, 0.7), (0.0, 0.4), (0.501, 0.502)])
def test_multistep_is_exact_for_a_piecewise_constant_prediction(interval):
    """Recorder predicts 30 without guidance and 0 with guidance 2."""
    low, high = interval
    noise = torch.tensor([[[3.0]]], dtype=torch.float64)
    config = SamplingConfig(steps=6, guidance=2.0, interval=interval)
    actual = sample_latents(Recorder(), torch.tensor([2]), noise, config)
    expected, left = 3.0, {0.0: 1.0, low: 1 - low, high: 1 - high} | {1.0: 0.05 / math.e}
    for start, end in pairwise(sorted({0.0, low, high, 1.0})):
        z = 0.0 if low <= start < high else 30.0
        expected = z + left[end] / left[start] * (expected - z)
    assert actual.item() == pytest.approx(expected, rel=1e-6)


def test_without_guidance_or_jump_there_is_one_segment():
    assert len(smooth_segments(SamplingConfig(guidance=1.0, interval=(0.1, 0.9)))) == 1
    assert len(smooth_segments(SamplingConfig(guidance=2.0, interval=(0.0, 1.0)))) == 1
    assert len(smooth_segments(SamplingConfig(guidance=2.0, interval=(0.5, 0.5)))) == 1
    assert [times[0] for times in smooth_segments(SamplingConfig(guidance=2.0, interval=(0.1, 0.9)))] == [0, 0.1, 0.9]


def test_guided_prediction_of_the_real_model(tiny_model):
    x, labels = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 4])
    t = torch.full((2,), 0.4)
    for order, denoise in (("norm_first", tiny_model.denoise), ("cfg_first", tiny_model.encoder)):
        config = SamplingConfig(guidance=3.0, order=order)
        with torch.no_grad():
            conditional, without = denoise(x, t, labels), denoise(x, t, torch.tensor([5, 5]))
            actual = GuidedPrediction(Network.of(tiny_model, order).denoise, labels, 5, config)(0.4, x)
        torch.testing.assert_close(actual, without + 3 * (conditional - without), rtol=0, atol=1e-5)


FAST = SamplingConfig(solver="euler", steps=3, guidance=2.0)


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_any_batch_size_gives_the_same_images(batch, tiny_model):
    labels = torch.tensor([0, 1, 4, 2, 2])
    actual = sample_images(tiny_model, labels, FAST, batch=batch)
    expected = sample_images(tiny_model, labels, FAST, batch=5)
    assert actual.shape == (5, 3, 8, 8) and actual.dtype == torch.uint8
    # Another batch may sum in another order, so a value between two levels may round to either.
    assert (actual.int() - expected.int()).abs().max() <= 1
    assert not torch.equal(actual[3], actual[4])


def test_an_image_depends_on_seed_index_and_label_only(tiny_model):
    first = sample_images(tiny_model, torch.tensor([0, 1, 2]), FAST)
    assert torch.equal(first, sample_images(tiny_model, torch.tensor([0, 1, 2]), FAST))
    other_labels = sample_images(tiny_model, torch.tensor([0, 3, 2]), FAST)
    assert torch.equal(other_labels[[0, 2]], first[[0, 2]])
    assert not torch.equal(other_labels[1], first[1])
    assert not torch.equal(sample_images(tiny_model, torch.tensor([0, 1, 2]), FAST, seed=1), first)


@pytest.mark.parametrize("wrong", [-1, 5])
def test_an_unknown_class_is_refused(wrong, tiny_model, mentions):
    with pytest.raises(UserError, match=mentions("class", wrong, "0..4")):
        sample_images(tiny_model, torch.tensor([0, wrong]), FAST)


def test_the_network_is_one_graph_and_compiled_once_per_shape(tiny_model):
    """No graph break (fullgraph), and no compilation after the first guided step, the first unguided step and the first
    decoding: neither for other times, labels and noise nor for later steps of the solver."""
    counter = CompileCounter()
    network = Network.of(tiny_model, "norm_first").compiled(backend=counter, fullgraph=True)
    config = replace(FAST, solver="multistep", steps=6, interval=(0.2, 0.8))
    images = []
    for positions in (torch.arange(3), torch.arange(3, 6)):
        labels = positions % 5
        images.append(sample_batch(tiny_model, network, labels, positions, config, seed=0)[0])
        eager = sample_images(tiny_model, labels, config, first=int(positions[0]))
        assert (images[-1].int() - eager.int()).abs().max() <= 1
        assert counter.frame_count == 3
    assert not torch.equal(*images)


def test_bfloat16_is_for_the_network_only(tiny_model):
    """Images stay near those of float32; the network's outputs and the decoder's inputs are float32."""
    calls = []

    def denoise(x, t, labels):
        calls.append((x.dtype, t.dtype, torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")))
        return tiny_model.denoise(x, t, labels)

    labels, network = torch.tensor([0, 1]), Network(denoise, lambda latents, labels: tiny_model.decode(latents))
    full, _ = sample_batch(tiny_model, network, labels, torch.arange(2), FAST, seed=0)
    half, _ = sample_batch(tiny_model, network, labels, torch.arange(2), FAST, 0, "bfloat16")
    assert calls[0] == (torch.float32, torch.float32, torch.bfloat16, False)
    assert calls[-1] == (torch.float32, torch.float32, torch.bfloat16, True)
    assert 0 < (full.int() - half.int()).abs().float().mean() < 8


def test_weights_are_cast_once_for_all_passes(tiny_model, count_casts, bfloat16_matmuls):
    network, labels, sampled = Network.of(tiny_model, "norm_first"), torch.tensor([0, 1]), []

    def sample():
        sampled.append(sample_batch(tiny_model, network, labels, torch.arange(2), FAST, 0, "bfloat16"))

    counts = count_casts(tiny_model, sample)
    back = {name for name, source, _ in counts if source == torch.bfloat16}
    assert sampled[0][1] > 1 and set(counts.values()) == {1}
    assert len(back) > 20 if not bfloat16_matmuls else not back


def test_sampling_builds_no_graph(tiny_model):
    noise = torch.zeros(1, 4, 6)
    assert not sample_latents(tiny_model, torch.tensor([0]), noise, FAST).requires_grad


@pytest.mark.parametrize("batch", [1, 64])
def test_reconstruction_is_tokenizer_and_decoder(batch, tiny_model):
    images = torch.randint(256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    registers = Philox(7, 0, torch.arange(3)).normal(Stream.REGISTERS, (4, 6))
    with torch.no_grad():
        expected = tiny_model.decode(tiny_model.tokenize(images / 255, registers, torch.zeros(3)))
    actual = reconstruct(tiny_model, images, seed=7, batch=batch)
    assert (actual.int() - to_uint8(expected).int()).abs().max() <= 1


def test_uint8_is_clamped_and_truncated():
    values = torch.tensor([-1.0, 0.0, 0.5, 254.99 / 255, 1.0, 1.7])
    assert to_uint8(values).tolist() == [0, 0, 127, 254, 255, 255]
    assert to_uint8(values.bfloat16()[[0, 2, 5]]).tolist() == [0, 127, 255]


@pytest.mark.parametrize(
    ("classes", "count", "labels"),
    [([], 7, [0, 1, 2, 3, 4, 0, 1]), ([3], 2, [3, 3]), ([3, 1, 4], 5, [3, 1, 4, 3, 1]), ([0, 2], 1, [0])],
)
def test_labels_cycle_through_the_classes(classes, count, labels):
    chosen = choose_labels(classes, count, num_classes=5)
    assert chosen.tolist() == labels and chosen.dtype == torch.int64


@pytest.mark.parametrize("classes", [[5], [0, -1], [99999999999999999999]])
def test_classes_out_of_range_are_refused(classes, mentions):
    with pytest.raises(UserError, match=mentions("class", classes[-1], "0..4")):
        choose_labels(classes, 3, 5)


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep", "dopri5"])
def test_images_that_are_not_finite_are_refused(tiny_model, solver, mentions):
    """NaN would become black squares."""
    config = replace(FAST, solver=solver, guidance=1e30)
    with pytest.raises(NonFinite, match=mentions("2 of 2", "guidance 1e+30", solver)) as caught:
        sample_images(tiny_model, torch.tensor([0, 1]), config)
    assert caught.value.count == 2


def test_each_image_of_a_batch_is_checked(tiny_model, mentions):
    latents = torch.zeros(3, 4, 6)
    images = torch.zeros(3, 3, 8, 8)
    assert torch.equal(finished(images, latents, "a test"), to_uint8(images))
    for value in (math.nan, math.inf, -math.inf):
        for tensor in (images, latents):
            broken = tensor.clone()
            broken[1].view(-1)[-1] = value
            pair = (broken, latents) if tensor is images else (images, broken)
            with pytest.raises(NonFinite, match=mentions("1 of 3", "a test")):
                finished(*pair, "a test")
    # Large numbers whose sum overflows are finite.
    assert finished(torch.full((1, 3, 8, 8), 3e38), latents[:1], "a test").min() == 255


def test_reconstructions_that_are_not_finite_are_refused(tiny_model, mentions):
    with torch.no_grad():
        tiny_model.decoder.pred.bias[0] = math.nan
    with pytest.raises(NonFinite, match=mentions("2 of 2")):
        reconstruct(tiny_model, torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
