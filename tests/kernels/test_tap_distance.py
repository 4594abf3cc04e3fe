"""The Triton backend of tap_distance against the reference, which tests/test_lpips.py compares with the formula."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unite_fast import kernels
from unite_fast.kernels import backend
from unite_fast.kernels.registry import OPS, Size
from unite_fast.kernels.tap_distance import Tap, dropout_mask, tap_distance_op, tap_distance_ref
from unite_fast.randomness import Philox, Stream

F32, BF16 = torch.float32, torch.bfloat16
STREAM, DRAW = Stream.LPIPS_DROPOUT, 3
SHAPES = [(2, 32, 5, 7), (3, 96, 4, 2), (2, 64, 7, 9), (2, 512, 3, 3), (1, 128, 2, 5)]
"""Odd sides, a number of channels that is no power of two, several programs per image."""
KEYS = [(0, 0), (2**31, 2**31 - 1), (2**32 + 5, 2**31), (2**64 - 1, 2**32 - 1)]
"""Seed and step: with and without the high bit of each word."""
POSITIONS = [5, 2**31, 3 * 2**32 - 1]


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
def make(draw, device):
    """Makes y, and the other arguments by name."""

    def arguments(shape, dtype=F32, seed=2**33 + 1, step=3, **changes) -> tuple[Tensor, dict]:
        y, x = (draw(*shape).to(device, dtype, memory_format=torch.channels_last) for _ in range(2))
        philox = Philox(seed, step, torch.tensor(POSITIONS[: shape[0]], dtype=torch.int64, device=device))
        others = {"weight": draw(shape[1]).abs().to(device), "bias": 0.3 * draw(shape[1]).to(device)}
        return y, {"x": x, **others, "philox": philox, "stream": STREAM, "draw": DRAW} | changes

    return arguments


def bind(function, others):
    """A function of y alone that returns the distance and pooled y. With a float64 y, all numbers are float64."""

    def call(y):
        cast = {}
        if y.dtype == torch.float64:
            numbers = {name: others[name] for name in ("x", "weight", "bias") if others[name] is not None}
            cast = {name: v.double() for name, v in numbers.items()}
        with backend.using("reference" if function is tap_distance_ref else "triton"):
            tap = function(y, **others | cast)
        # As a matrix, which the judge can transpose.
        return (tap.distance[:, None], tap.y) if others.get("pool", True) else (tap.distance[:, None],)

    return call


def run(function, y, others):
    """Distance, pooled y and the gradient of y."""
    y = y.detach().requires_grad_()
    results = bind(function, others)(y)
    generator = torch.Generator().manual_seed(3)
    incoming = [torch.randn(r.shape, generator=generator).to(r) for r in results]
    return *(r.detach() for r in results), *torch.autograd.grad(results, y, incoming)


def assert_same(ours, others):
    for mine, other in zip(ours, others, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_against_float64(make, judge, dtype, shape):
    y, others = make(shape, dtype)
    judge(bind(kernels.tap_distance, others), bind(tap_distance_ref, others), {"y": y}, (F32, dtype))


@pytest.mark.parametrize("without", [{"bias": None}, {"philox": None}, {"pool": False}, {"bias": None, "philox": None}])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_without_a_part_against_float64(make, judge, dtype, without):
    y, others = make((3, 96, 5, 3), dtype, **without)
    results = (F32, dtype) if others.get("pool", True) else (F32,)
    judge(bind(kernels.tap_distance, others), bind(tap_distance_ref, others), {"y": y}, results)


@pytest.mark.parametrize("shape", [(2, 40, 3, 5), (2, 3, 2, 2)])
def test_any_number_of_channels_without_dropout(make, judge, shape):
    y, others = make(shape, philox=None)
    judge(bind(kernels.tap_distance, others), bind(tap_distance_ref, others), {"y": y}, (F32, F32))


def test_both_images_are_pooled(make):
    y, others = make((2, 32, 5, 7))
    assert_same([kernels.tap_distance(y, **others).x], [tap_distance_ref(y, **others).x])


@pytest.mark.parametrize("channels", [32, 64, 96, 128, 256, 512])
@pytest.mark.parametrize(("seed", "step"), KEYS)
def test_the_mask_has_the_bits_of_the_words(device, channels, seed, step):
    """Where all features are 1 and x is 0, the gradient of a channel is above the mean if dropout keeps it."""
    philox = Philox(seed, step, torch.tensor(POSITIONS, device=device))
    y = torch.ones(3, channels, 1, 3, device=device).to(memory_format=torch.channels_last)
    arguments = {"philox": philox, "stream": STREAM, "draw": DRAW, "pool": False}
    mask = dropout_mask(philox, STREAM, DRAW, y.shape[1:])
    y = y.requires_grad_()
    tap = kernels.tap_distance(y, torch.zeros_like(y), torch.ones(channels, device=device), None, **arguments)
    expected = mask.sum((1, 2, 3)).float() / channels / 3
    torch.testing.assert_close(tap.distance.detach(), expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(tap.distance.sum(), y)
    assert torch.equal(gradient > gradient.mean(1, keepdim=True), mask > 0)


def test_keys_of_another_call_give_another_mask(make):
    y, others = make((2, 32, 4, 4), pool=False)
    distance = kernels.tap_distance(y, **others).distance
    for change in (
        {"draw": DRAW + 1},
        {"stream": Stream.FLIP},
        {"philox": Philox(2**33 + 1, 4, others["philox"].positions)},
    ):
        assert (kernels.tap_distance(y, **others | change).distance != distance).all()


def test_pixels_of_zeros_have_no_gradient_and_no_nan(make):
    y, others = make((2, 32, 4, 4), bias=None, philox=None)
    y, x = torch.relu(y), torch.relu(others["x"])
    y[:, :, 1] = 0
    x[:, :, 2] = 0
    x[0, :, 1, 3] = 0
    ours, expected = (run(f, y, others | {"x": x}) for f in (kernels.tap_distance, tap_distance_ref))
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other)
    assert ours[2].isfinite().all()


def test_dead_features_have_no_gradient(make):
    """Where the ReLU gives 0 the gradient is 0, of the distance and of the pooled features."""
    y, others = make((2, 32, 5, 6))
    *_, gradient = run(kernels.tap_distance, y, others)
    dead = y + others["bias"][:, None, None] <= 0
    assert 0 < dead.sum() < dead.numel()
    assert (gradient[dead] == 0).all()


def test_the_first_maximum_of_a_window_gets_the_gradient(device):
    values = torch.tensor([[1.0, 1.0], [1.0, 0.5]]), torch.tensor([[0.0, 2.0], [2.0, 2.0]])
    values += torch.tensor([[0.0, 1.0], [3.0, 3.0]]), torch.tensor([[1.0, torch.nan], [torch.nan, 2.0]])
    y = torch.stack(values)[None].to(device)
    channels = y.shape[1]
    x, weight = torch.zeros_like(y), torch.zeros(channels, device=device)
    for bias in (None, torch.zeros(channels, device=device)):
        leaf, plain = y.clone().requires_grad_(), y.clone().requires_grad_()
        pooled = kernels.tap_distance(leaf, x, weight, bias).y
        expected = F.max_pool2d(plain, 2)
        assert torch.equal(pooled.nan_to_num(-1), expected.nan_to_num(-1))
        pooled.sum().backward()
        expected.sum().backward()
        # A NaN makes all of its pixel NaN, whose gradient of the distance is NaN too.
        known = leaf.grad.isfinite()
        assert torch.equal(leaf.grad[known], plain.grad[known]) and known.sum() >= 8


def test_either_result_alone_has_its_gradient(make):
    y, others = make((2, 32, 5, 6))
    leaf = y.requires_grad_()
    tap = kernels.tap_distance(leaf, **others)
    incoming = torch.randn_like(tap.y)
    (both,) = torch.autograd.grad((tap.distance.sum(), (tap.y * incoming).sum()), leaf, retain_graph=True)
    (first,) = torch.autograd.grad(tap.distance.sum(), leaf, retain_graph=True)
    (second,) = torch.autograd.grad((tap.y * incoming).sum(), leaf)
    torch.testing.assert_close(first + second, both)
    assert first.any() and second.any() and not tap.x.requires_grad


def test_any_layout_gives_the_same_bits(make):
    y, others = make((2, 32, 5, 6))
    expected = run(kernels.tap_distance, y, others)
    assert_same(run(kernels.tap_distance, y.contiguous(), others | {"x": others["x"].contiguous()}), expected)
    strided = torch.zeros(2, 64, 5, 12, device=y.device)[:, ::2, :, ::2].copy_(y)
    positions = torch.tensor(POSITIONS, device=y.device).repeat_interleave(2)[:4:2]
    philox = Philox(others["philox"].seed, others["philox"].step, positions)
    assert_same(run(kernels.tap_distance, strided, others | {"philox": philox}), expected)
    assert_same(run(kernels.tap_distance, y, others), expected)


def test_several_tiles_per_program(make, judge, monkeypatch):
    from unite_fast.kernels.triton_kernels import tap_distance as kernel

    monkeypatch.setattr(kernel, "PROGRAMS", 2)
    y, others = make((2, 64, 13, 7))
    programs, tiles = kernel._grid(y, kernel._sizes(y))
    assert tiles > 1 and programs[1] > 1
    judge(bind(kernels.tap_distance, others), bind(tap_distance_ref, others), {"y": y}, (F32, F32))


def test_only_the_inputs_are_saved_for_backward(make):
    y, others = make((2, 32, 5, 6), BF16)
    saved = set()
    y.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.add(v.data_ptr()) or v, lambda v: v):
        kernels.tap_distance(y, **others)
    inputs = (y, others["x"], others["weight"], others["bias"], others["philox"].positions)
    assert saved == {v.data_ptr() for v in inputs}


@pytest.mark.parametrize(("dtype", "pool"), [(F32, False), (BF16, True)])
def test_opcheck(make, dtype, pool):
    y, others = make((2, 32, 3, 5), dtype, pool=pool)
    arguments = OPS["tap_distance"].inputs({"y": y.requires_grad_(), **others})
    torch.library.opcheck(tap_distance_op.op, arguments)
    results = tap_distance_op.op(*arguments)
    incoming = [torch.randn_like(r) for r in results]
    saved = [v.detach() if isinstance(v, Tensor) else v for v in tap_distance_op.saved(arguments, results)]
    torch.library.opcheck(tap_distance_op.backward_op, (*incoming, *saved))


def test_it_compiles_to_one_graph(make):
    y, others = make((2, 32, 5, 6), BF16)
    torch._dynamo.reset()

    def call(y, **others):
        return tuple(kernels.tap_distance(y, **others))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(run(lambda y, **others: Tap(*compiled(y, **others)), y, others), run(kernels.tap_distance, y, others))


def test_activation_checkpointing_gives_the_same_bits(make):
    y, others = make((2, 32, 5, 6), BF16)

    def checkpointed(y, **others):
        return checkpoint(lambda y: kernels.tap_distance(y, **others), y, use_reentrant=False)

    assert_same(run(checkpointed, y, others), run(kernels.tap_distance, y, others))


def test_an_empty_batch(make):
    y, others = make((0, 32, 4, 4))
    distance, pooled, gradient = run(kernels.tap_distance, y, others)
    assert (distance.shape, pooled.shape, gradient.shape) == ((0, 1), (0, 32, 2, 2), y.shape)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 5)}, r"x must be \[2, 3, 4, 4\], got \[2, 3, 4, 5\]"),
        ({"weight": torch.zeros(4)}, r"weight must be \[3\], got \[4\]"),
        ({"weight": torch.zeros(3, requires_grad=True)}, "weight gets no gradient; detach it"),
        ({"bias": torch.zeros(2)}, r"bias must be \[3\], got \[2\]"),
        ({"y": torch.zeros(2, 3)}, r"y must be \[B, C, H, W\]"),
        ({"y": torch.zeros(2, 3, 1, 4)}, "H and W above 1"),
        ({"philox": Philox(0, 0, torch.arange(3))}, r"positions of philox must be int64 \[2\]"),
        ({"philox": Philox(2**64, 0, torch.arange(2))}, "seed 18446744073709551616"),
        ({"philox": Philox(0, 0, torch.arange(2))}, "multiple of 32 channels, got 3"),
    ],
)
def test_invalid_arguments_are_refused(wrong, message):
    valid = {"y": torch.zeros(2, 3, 4, 4), "x": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=f"tap_distance: .*{message}"):
        kernels.tap_distance(**valid | wrong)


def test_the_example_of_the_registry_has_pixels_in_both_directions():
    example = OPS["tap_distance"].example(Size(2, 12, 32), lambda *shape, dtype=F32: torch.zeros(shape, dtype=dtype))
    assert example["y"].shape == (2, 32, 3, 4)
