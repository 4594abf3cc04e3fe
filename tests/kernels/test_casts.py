"""Copies of `cast_once` are found by a trick: they are overwritten with zeros, so a product that takes them is zero."""

import gc
import weakref

import pytest
import torch

from unite_fast import kernels
from unite_fast.kernels import backend, casts
from unite_fast.kernels.casts import cast, cast_once, joined
from unite_fast.lpips import LINEAR_SHAPES, LPIPS, VGG_SHAPES
from unite_fast.model.layers import SwiGLU, matmul_weights
from unite_fast.model.unite import UNITE

HALF = torch.bfloat16


@pytest.fixture
def backend_name(fast_backend_on_a_cpu):
    return fast_backend_on_a_cpu


@pytest.fixture
def weight(draw):
    return draw(24, 16).requires_grad_()


def held(weight):
    return cast(weight.detach(), HALF)


def test_a_copy_is_the_cast_made_once(weight):
    with cast_once([weight]):
        first, second = held(weight), held(weight)
    assert torch.equal(first, weight.detach().bfloat16())
    assert first.data_ptr() == second.data_ptr() != held(weight).data_ptr()


def test_nothing_is_held_afterwards_nor_after_an_error(weight):
    with pytest.raises(RuntimeError, match="on purpose"), cast_once([weight]):
        copy = weakref.ref(held(weight).untyped_storage())
        raise RuntimeError("on purpose")
    gc.collect()
    assert not casts._copies
    assert copy() is None


def test_a_weight_that_was_changed_is_cast_anew(weight):
    with cast_once([weight]), torch.no_grad():
        before = held(weight).clone()
        weight.add_(1)
        assert torch.equal(cast(weight, HALF), weight.bfloat16())
        assert not torch.equal(cast(weight, HALF), before)
        with cast_once([weight]):  # which replaces what is out of date
            assert torch.equal(casts._find(weight, HALF), weight.bfloat16())
        assert casts._find(weight, HALF) is None
        assert torch.equal(cast(weight, HALF), weight.bfloat16())


def test_a_weight_whose_memory_was_replaced_is_cast_anew(weight):
    with cast_once([weight]):
        weight.data = torch.randn(24, 16)
        assert torch.equal(held(weight), weight.detach().bfloat16())


def test_within_another(weight, draw):
    other = draw(8, 16)
    with cast_once([weight]):
        outer = held(weight).data_ptr()
        with cast_once([weight, other]):
            assert held(weight).data_ptr() == outer
            inner = held(other).data_ptr()
            assert held(other).data_ptr() == inner
        assert held(weight).data_ptr() == outer
        assert casts._find(other, HALF) is None
    assert not casts._copies


def test_what_needs_no_copy_has_none(draw):
    with cast_once([draw(4, 4, dtype=HALF), draw(4, 4).double()]):
        assert not casts._copies
    with cast_once([draw(4, 4)], torch.float32):
        assert not casts._copies
    with torch.inference_mode():
        inference = torch.randn(4, 4)
    with cast_once([inference]):
        assert torch.equal(cast(inference, HALF), inference.bfloat16())


def test_autograd_sees_a_cast_outside_an_operator(weight):
    with cast_once([weight]):
        cast(weight, HALF).float().sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_strides_are_kept(draw):
    kernel = draw(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    with cast_once([draw(3, 3), kernel]):
        assert held(kernel).is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(held(kernel), kernel.bfloat16())
        assert held(kernel).storage_offset() == casts.ALIGNED


def test_joined(draw):
    weights, biases = [draw(n, 16) for n in (8, 4, 12)], [draw(n) for n in (8, 4, 12)]
    want = torch.cat(weights).bfloat16()
    assert torch.equal(joined(weights, HALF), want)
    with cast_once([*weights, *biases]):
        assert torch.equal(joined(weights, HALF), want)
        assert joined(weights, HALF).data_ptr() == held(weights[0]).data_ptr()
        assert torch.equal(joined(weights[::-1], HALF), torch.cat(weights[::-1]).bfloat16())
        # Not multiples of 64: there are gaps between.
        assert torch.equal(joined(biases, HALF), torch.cat(biases).bfloat16())


OPS = {
    "linear": (lambda x, w, b: kernels.linear(x, w, b), 16),
    "linears": (lambda x, w, b: kernels.linears(x[:, 0], [w, w], [b, b]), 16),
    "swiglu_linear": (lambda x, w, b: kernels.swiglu_linear(x, w, b), 32),
    "gelu_linear": (lambda x, w, b: kernels.gelu_linear(x, w, b), 16),
    "layer_norm_linear": (
        lambda x, w, b: kernels.layer_norm_linear(x.float(), torch.ones(16), torch.zeros(16), w, b, 1e-6),
        16,
    ),
    "gated_residual_adaln_linear": (
        lambda x, w, b: kernels.gated_residual_adaln_linear(
            x.float(), x, *(torch.ones(2, 16), torch.ones(16), torch.ones(2, 16), torch.ones(2, 16)), w, b
        )[1],
        16,
    ),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_operators_take_copies_forward_and_backward(name, compiled, weight, draw, backend_name):
    op, width = OPS[name]
    x, bias = draw(2, 3, width, dtype=HALF).requires_grad_(), draw(24).requires_grad_()

    def run(x):
        with torch.autocast("cpu", HALF):
            y = op(x, weight, bias)
        return y.detach(), *torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))

    torch._dynamo.reset()

    def step(x):
        if not compiled:
            return run(x)
        forward = torch.compile(lambda x: op(x, weight, bias), backend="aot_eager")
        with torch.autocast("cpu", HALF):
            y = forward(x)
        return y.detach(), *torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))

    want = run(x)
    with cast_once([weight, bias]):
        got = step(x)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert got[2].dtype == torch.float32
        held(weight).zero_()
        held(bias).zero_()
        y, d_x, *_ = step(x)
    assert not y.any()
    assert not d_x.any()
    assert all(torch.equal(a, b) for a, b in zip(step(x), want, strict=True))


def test_in_float32_nothing_changes(weight, draw):
    x, bias = draw(2, 3, 16), draw(24)
    want = kernels.linear(x, weight, bias)
    with cast_once([weight, bias]):
        held(weight).zero_()
        assert torch.equal(kernels.linear(x, weight, bias), want)


def test_the_weights_of_a_model_that_profit(tiny_config):
    model = UNITE.create(tiny_config.model, seed=0)
    named = dict(model.named_parameters())
    names = {next(n for n, p in named.items() if p is weight) for weight in matmul_weights(model)}
    linears = {
        n.rpartition(".")[0] for n, m in model.named_modules() for n in (f"{n}.weight",) if hasattr(m, "in_features")
    }
    left_out = {name for name in linears if f"{name}.weight" not in names}
    assert left_out == {"encoder.time_embed.fc1", "encoder.time_embed.fc2"}
    assert all(named[name].dim() <= 2 for name in names)
    assert SwiGLU(24).padding == 0


def test_lpips_takes_copies(draw, backend_name):
    weights = ({name: draw(*shape).abs() for name, shape in shapes.items()} for shapes in (VGG_SHAPES, LINEAR_SHAPES))
    lpips = LPIPS(*weights)
    image, recon = draw(1, 3, 16, 16), draw(1, 3, 16, 16)
    with torch.autocast("cpu", HALF), backend.using("reference"):
        want = lpips(image, recon)
        with cast_once(lpips.matmul_weights()):
            assert torch.equal(lpips(image, recon), want)
            for parameter in lpips.matmul_weights():
                held(parameter).zero_()
            assert not lpips(image, recon).any()
