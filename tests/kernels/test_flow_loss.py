"""flow_loss on each backend against its formula in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from unite_fast.kernels import backend, flow_loss, native
from unite_fast.kernels.flow_loss import flow_loss_op

FLOOR = 0.05
SHAPES = {
    "native": [(1, 3, 1, 7), (2, 3, 150, 33), (3, 2, 65, 32), (2, 2, 20, 16)],
    "triton": [(1, 2, 1, 7), (2, 2, 70, 33), (3, 2, 9, 32)],
    # On a CPU, PyTorch's LayerNorm sums the weight's gradient token by token: over 390 tokens, its error is 6e-7.
    "reference": [(1, 3, 1, 7), (2, 3, 15, 33), (3, 2, 9, 32)],
}
"""F, B, N, C: a single token, more than one chunk of tokens, numbers of channels that C++ knows at compile time."""
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "autocast": (torch.bfloat16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
}
"""Dtypes of y and z."""


fast_backends = pytest.mark.parametrize("backend_name", ["native", "triton"], indirect=True)


def make_inputs(draw, shape, y_dtype=torch.float32, z_dtype=torch.float32) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The tensors with a gradient, z and t. One 1 - t is below the floor."""
    draws, samples, tokens, channels = shape
    t = draw(draws, samples).sigmoid()
    t[0, 0] = 0.98
    y = draw(*shape, around=0.5) * 3
    inputs = {"y": y.to(y_dtype), "weight": draw(channels, around=1.0), "bias": draw(channels)}
    return inputs, draw(samples, tokens, channels, dtype=z_dtype), t


def formula(z: Tensor, t: Tensor, lengths: Tensor | None = None):
    def op(y, weight, bias):
        centred = y - y.mean(-1, keepdim=True)
        prediction = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5) * weight + bias
        time_left = torch.clamp(1 - t.to(weight.dtype), min=FLOOR)
        errors = ((z.to(weight.dtype) - prediction) / time_left[:, :, None, None]) ** 2
        if lengths is None:
            return errors.mean((2, 3))
        # Each sample without its pads.
        return torch.stack([errors[:, b, :length].mean((1, 2)) for b, length in enumerate(lengths.tolist())], dim=1)

    return op


def bind(z: Tensor, t: Tensor, lengths: Tensor | None = None):
    return lambda y, weight, bias: flow_loss(y, weight, bias, z, t, FLOOR, lengths=lengths)


def make_lengths(draw, shape, dtype: torch.dtype) -> Tensor:
    """One sample without pads, the others with random lengths."""
    lengths = 1 + (shape[2] * torch.special.ndtr(draw(shape[1]))).long().clamp_max(shape[2] - 1)
    lengths[0] = shape[2]
    return lengths.to(dtype)


def pads(lengths: Tensor, tokens: int) -> Tensor:
    """Which tokens are pads, bool [B, N]."""
    return torch.arange(tokens, device=lengths.device) >= lengths[:, None]


def run(inputs: dict[str, Tensor], z: Tensor, t: Tensor, op=None, lengths: Tensor | None = None) -> tuple[Tensor, ...]:
    """Loss and gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs.values()]
    loss = (op or bind(z, t, lengths))(*inputs)
    incoming = torch.randn(loss.shape, generator=torch.Generator().manual_seed(3)).to(loss)
    return loss.detach(), *torch.autograd.grad(loss, inputs, incoming)


def assert_same(ours, others):
    for mine, other in zip(ours, others, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


CASES = [(backend_name, shape) for backend_name, shapes in SHAPES.items() for shape in shapes]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("backend_name", "shape"), CASES, indirect=["backend_name"])
def test_loss_and_gradients_against_float64(backend_name, shape, dtypes, judge, draw):
    inputs, z, t = make_inputs(draw, shape, *DTYPES[dtypes])
    judge(bind(z, t), formula(z, t), inputs, (torch.float32,))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("backend_name", "shape"), CASES, indirect=["backend_name"])
def test_tokens_that_count_against_float64(backend_name, shape, dtypes, judge, draw):
    inputs, z, t = make_inputs(draw, shape, *DTYPES[dtypes])
    lengths = make_lengths(draw, shape, torch.int64 if dtypes == "float32" else torch.int32)
    judge(bind(z, t, lengths), formula(z, t, lengths), inputs, (torch.float32,))


@pytest.mark.parametrize(("dtypes", "bad"), [("float32", math.nan), ("autocast", math.inf), ("bfloat16", 1e30)])
def test_nothing_of_a_pad_reaches_a_loss_or_a_gradient(backend_name, dtypes, bad, draw):
    inputs, z, t = make_inputs(draw, (2, 3, 70, 33), *DTYPES[dtypes])
    lengths = torch.tensor([70, 64, 5], device=z.device)  # 64: no more than one chunk of C++, two tiles of Triton
    expected = run(inputs, z, t, lengths=lengths)
    pad = pads(lengths, 70)
    y, z = inputs["y"].clone(), z.clone()
    y[:, pad], z[pad] = bad, bad
    actual = run(inputs | {"y": y}, z, t, lengths=lengths)
    assert_same(actual, expected)
    assert all(x.isfinite().all() for x in actual)
    d_y = actual[1]
    assert not d_y[:, pad].any() and d_y[:, ~pad].any(dim=-1).all()


def test_a_gradient_that_is_not_finite_stays_out_of_the_pads(backend_name, draw):
    inputs, z, t = make_inputs(draw, (2, 3, 5, 6))
    lengths = torch.tensor([5, 2, 3], device=z.device)
    y = inputs["y"].requires_grad_()
    loss = flow_loss(*inputs.values(), z, t, FLOOR, lengths=lengths)
    (d_y,) = torch.autograd.grad(loss, y, torch.full_like(loss, float("nan")))
    pad = pads(lengths, 5)
    assert not d_y[:, pad].any() and d_y[:, ~pad].isnan().all()


def close(ours, other) -> bool:
    """Up to the rounding of sums in another order."""
    rounding = 2.0**-8 if other.dtype == torch.bfloat16 else 2e-6
    return (ours.float() - other.float()).norm() <= rounding * other.float().norm()


@pytest.mark.parametrize("dtypes", DTYPES)
def test_lengths_of_all_tokens_change_nothing(backend_name, dtypes, draw):
    inputs, z, t = make_inputs(draw, (2, 2, 70, 33), *DTYPES[dtypes])
    ours, others = run(inputs, z, t, lengths=torch.full((2,), 70, device=z.device)), run(inputs, z, t)
    if backend_name == "native" or (backend_name == "triton" and backend.interpreted()):
        assert_same(ours, others)
    assert all(map(close, ours, others))


def test_a_sample_with_pads_is_the_sample_without_them(backend_name, draw):
    lengths = [70, 9, 65]
    inputs, z, t = make_inputs(draw, (2, 3, 70, 16))
    loss, d_y, *summed = run(inputs, z, t, lengths=torch.tensor(lengths, device=z.device))
    incoming = torch.randn(loss.shape, generator=torch.Generator().manual_seed(3)).to(loss)
    expected = [torch.zeros_like(x) for x in summed]
    for b, length in enumerate(lengths):
        y, *weights = inputs.values()
        leaves = [x.detach().requires_grad_() for x in (y[:, b : b + 1, :length], *weights)]
        alone = bind(z[b : b + 1, :length], t[:, b : b + 1])(*leaves)
        of_y, *of_weights = torch.autograd.grad(alone, leaves, incoming[:, b : b + 1])
        assert close(loss[:, b : b + 1], alone.detach()) and close(d_y[:, b : b + 1, :length], of_y)
        expected = [total + gradient for total, gradient in zip(expected, of_weights, strict=True)]
    assert all(map(close, summed, expected))


def test_the_loss_of_a_sample_is_a_mean(backend_name, draw):
    """Computed in Python floats: LayerNorm returns this y up to rounding."""
    z = draw(4, 5, 2)
    t, y = z.new_tensor([[0.0, 0.5, 0.94, 0.999]]), z.new_tensor([-1.0, 1.0]).repeat(1, 4, 5, 1)
    actual = flow_loss(y, z.new_ones(2), z.new_zeros(2), z, t, FLOOR, eps=0.0)
    for i in range(4):
        time_left = max(1 - t[0, i].item(), FLOOR)
        errors = [((a - b) / time_left) ** 2 for a, b in zip(z[i].flatten().tolist(), [-1.0, 1.0] * 5, strict=True)]
        assert actual[0, i].item() == pytest.approx(math.fsum(errors) / 10, rel=1e-6)


@pytest.mark.parametrize("layout", ["tokens", "draws", "channels", "transposed", "expanded"])
def test_strided_inputs(backend_name, layout, judge, draw):
    inputs, z, t = make_inputs(draw, (2, 3, 4, 6))
    y = inputs["y"]
    inputs["y"] = {
        "tokens": y.new_zeros(2, 3, 8, 6)[:, :, ::2].copy_(y),
        "draws": y.transpose(0, 1).contiguous().transpose(0, 1),
        "channels": y.new_zeros(2, 3, 4, 12)[..., ::2].copy_(y),
        "transposed": y.mT.contiguous().mT,
        "expanded": y[:1].expand(2, 3, 4, 6),
    }[layout]
    z, t = z.mT.contiguous().mT, t.t().contiguous().t()
    inputs["weight"] = draw(12)[::2]
    judge(bind(z, t), formula(z, t), inputs, (torch.float32,))


def test_an_expanded_incoming_gradient(backend_name, draw):
    """The gradient of a mean is one number for all elements."""
    inputs, z, t = make_inputs(draw, (2, 3, 4, 6))
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    actual = torch.autograd.grad(bind(z, t)(*inputs.values()).mean(), list(inputs.values()))
    expected = torch.autograd.grad(formula(z, t)(*inputs.values()).mean(), list(inputs.values()))
    for mine, other in zip(actual, expected, strict=True):
        assert (mine - other).norm() <= 2e-6 * other.norm()


@fast_backends
@pytest.mark.parametrize("dtypes", DTYPES)
def test_repeated_calls_give_the_same_bits(backend_name, dtypes, draw):
    inputs = make_inputs(draw, (2, 2, 70, 33), *DTYPES[dtypes])
    assert_same(*(run(*inputs) for _ in range(2)))


@pytest.mark.skipif(not native.available(), reason=native.reason() or "built")
@pytest.mark.parametrize("lengths", [None, torch.tensor([130, 1, 77])], ids=["", "lengths"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(dtypes, lengths, draw):
    arguments = *make_inputs(draw, (3, 3, 130, 42), *DTYPES[dtypes]), None, lengths
    before = torch.get_num_threads()
    try:
        with backend.using("native"):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(run(*arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (1, 0, 70, 32)])
def test_an_empty_batch(backend_name, shape, draw):
    inputs = {"y": draw(*shape), "weight": draw(shape[3]), "bias": draw(shape[3])}
    loss, d_y, d_weight, d_bias = run(inputs, draw(*shape[1:]), draw(*shape[:2]))
    assert (loss.shape, d_y.shape) == (shape[:2], shape)
    assert d_weight.tolist() == d_bias.tolist() == [0.0] * shape[3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["y", "z", "t"])
def test_nonfinite_inputs_affect_only_their_samples(backend_name, where, bad, draw):
    inputs, z, t = make_inputs(draw, (2, 3, 5, 6))
    element, affected = {
        "y": (inputs["y"][1, 2, 3], [[1, 2]]),
        "z": (z[2, 3], [[0, 2], [1, 2]]),
        "t": (t[1, 2], [[1, 2]]),
    }[where]
    if where == "t" and bad == float("inf"):
        bad = float("nan")  # 1 - inf would be clamped to the floor
    element.fill_(bad)
    loss = flow_loss(*inputs.values(), z, t, FLOOR)
    if where == "t" and bad == -float("inf"):
        assert loss[1, 2] == 0
    else:
        assert (~loss.isfinite()).nonzero().tolist() == affected


def test_a_constant_token_has_a_finite_loss_and_gradient(backend_name, draw):
    inputs, z, t = make_inputs(draw, (1, 2, 3, 8))
    inputs["y"].fill_(2.5)
    assert all(x.isfinite().all() for x in run(inputs, z, t))


# As a PyTorch operator


padded = pytest.mark.parametrize("lengths", [None, torch.tensor([5, 2])], ids=["", "lengths"])


@fast_backends
@padded
@pytest.mark.parametrize("dtypes", DTYPES)
def test_opcheck(backend_name, dtypes, lengths, device, draw):
    inputs, z, t = make_inputs(draw, (2, 2, 5, 6), *DTYPES[dtypes])
    lengths = None if lengths is None else lengths.to(device)
    arguments = *(x.requires_grad_() for x in inputs.values()), z, t, FLOOR, 1e-5, lengths
    torch.library.opcheck(flow_loss_op.op, arguments)
    outputs = [x.detach() for x in flow_loss_op.op(*arguments)]
    saved = [x if x is None else x.detach() for x in flow_loss_op.saved(arguments, outputs)]
    torch.library.opcheck(flow_loss_op.backward_op, (torch.randn_like(outputs[0]), *saved))


@fast_backends
@padded
@pytest.mark.parametrize("dtypes", DTYPES)
def test_it_compiles_to_one_graph(backend_name, dtypes, lengths, device, draw):
    inputs, z, t = make_inputs(draw, (2, 2, 5, 6), *DTYPES[dtypes])
    op = bind(z, t, None if lengths is None else lengths.to(device))
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_same(run(inputs, z, t, compiled), run(inputs, z, t, op))


@fast_backends
@padded
def test_activation_checkpointing_gives_the_same_bits(backend_name, lengths, device, draw):
    inputs, z, t = make_inputs(draw, (2, 2, 5, 6))
    op = bind(z, t, None if lengths is None else lengths.to(device))

    def checkpointed(*x):
        return checkpoint(op, *x, use_reentrant=False)

    assert_same(run(inputs, z, t, checkpointed), run(inputs, z, t, op))


@padded
@pytest.mark.parametrize("dtypes", DTYPES)
def test_autocast_casts_nothing(backend_name, device, dtypes, lengths, draw):
    arguments = *make_inputs(draw, (2, 2, 5, 6), *DTYPES[dtypes]), None, None if lengths is None else lengths.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        under_autocast = run(*arguments)
    assert_same(under_autocast, run(*arguments))


@fast_backends
def test_fake_tensors_give_shapes_and_dtypes(backend_name, draw):
    inputs, z, t = make_inputs(draw, (2, 2, 5, 6), torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        loss = bind(z, t)(*(mode.from_tensor(x) for x in inputs.values()))
    assert (loss.shape, loss.dtype) == ((2, 2), torch.float32)


@fast_backends
def test_nothing_of_the_predictions_size_is_saved(backend_name, draw):
    inputs, z, t = make_inputs(draw, (2, 3, 5, 6))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        bind(z, t)(*(x.requires_grad_() for x in inputs.values()))
    known = {x.data_ptr() for x in (*inputs.values(), z)}
    assert sum(x.numel() for x in saved if x.data_ptr() not in known) == t.numel() * (1 + 2 * 5)


# Errors


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"y": torch.zeros(2, 3, 4)}, r"y must be \[F, B, N, C\] with N and C above 0, got \[2, 3, 4\]"),
        ({"y": torch.zeros(2, 3, 0, 5)}, r"y must be \[F, B, N, C\] with N and C above 0, got \[2, 3, 0, 5\]"),
        ({"weight": torch.zeros(4)}, r"weight must be \[5\], got \[4\]"),
        ({"bias": torch.zeros(1, 5)}, r"bias must be \[5\], got \[1, 5\]"),
        ({"z": torch.zeros(2, 3, 4, 5)}, r"z must be \[3, 4, 5\], got \[2, 3, 4, 5\]"),
        ({"t": torch.zeros(3)}, r"t must be \[2, 3\], got \[3\]"),
        ({"z": torch.zeros(3, 4, 5, requires_grad=True)}, "z gets no gradient; detach it"),
        ({"t": torch.zeros(2, 3, requires_grad=True)}, "t gets no gradient; detach it"),
        (
            {"lengths": torch.ones(2, dtype=torch.int32)},
            r"lengths must be int32 or int64 \[3\] on cpu, got torch.int32 \[2\]",
        ),
        ({"lengths": torch.ones(3)}, r"lengths must be int32 or int64 \[3\] on cpu, got torch.float32 \[3\]"),
        ({"lengths": torch.ones(3, dtype=torch.int32, device="meta")}, r"lengths must be .* on cpu, got .* on meta"),
    ],
)
def test_inconsistent_arguments_are_refused(wrong, message):
    right = {
        "y": torch.zeros(2, 3, 4, 5),
        "weight": torch.ones(5),
        "bias": torch.zeros(5),
        "z": torch.zeros(3, 4, 5),
        "t": torch.zeros(2, 3),
    }
    with pytest.raises(ValueError, match=f"flow_loss: {message}"):
        flow_loss(**(right | wrong), min_time_left=FLOOR)
