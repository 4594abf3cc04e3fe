"""The bfloat16 copies of `cast_once`. Tests overwrite a copy with zeros: an op that uses it then returns zeros."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from unite_fast import kernels
from unite_fast.kernels import backend, casts
from unite_fast.kernels.casts import cast, cast_once, derived, joined
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


def bfloat16_of(weight):
    """The copy, or a new cast if there is none."""
    return cast(weight.detach(), HALF)


def test_a_weight_is_cast_once(weight):
    with cast_once([weight]):
        first, second = bfloat16_of(weight), bfloat16_of(weight)
    assert torch.equal(first, weight.detach().bfloat16())
    assert first.data_ptr() == second.data_ptr() != bfloat16_of(weight).data_ptr()


def test_copies_are_freed_at_the_end_and_after_an_error(weight):
    with pytest.raises(RuntimeError, match="on purpose"), cast_once([weight]):
        copy = weakref.ref(bfloat16_of(weight).untyped_storage())
        raise RuntimeError("on purpose")
    gc.collect()
    assert not casts._copies
    assert copy() is None


def test_a_changed_weight_is_cast_again(weight):
    with cast_once([weight]), torch.no_grad():
        before = bfloat16_of(weight).clone()
        weight.add_(1)
        assert torch.equal(cast(weight, HALF), weight.bfloat16())
        assert not torch.equal(cast(weight, HALF), before)
        with cast_once([weight]):  # replaces the outdated copy
            assert torch.equal(casts._find(weight, HALF).tensor, weight.bfloat16())
        assert casts._find(weight, HALF) is None
        assert torch.equal(cast(weight, HALF), weight.bfloat16())


def test_a_weight_with_new_memory_is_cast_again(weight):
    with cast_once([weight]):
        weight.data = torch.randn(24, 16)
        assert torch.equal(bfloat16_of(weight), weight.detach().bfloat16())


def test_a_nested_context_keeps_the_outer_copies(weight, draw):
    other = draw(8, 16)
    with cast_once([weight]):
        outer = bfloat16_of(weight).data_ptr()
        with cast_once([weight, other]):
            assert bfloat16_of(weight).data_ptr() == outer
            inner = bfloat16_of(other).data_ptr()
            assert bfloat16_of(other).data_ptr() == inner
        assert bfloat16_of(weight).data_ptr() == outer
        assert casts._find(other, HALF) is None
    assert not casts._copies


def test_weights_that_need_no_cast_have_no_copy(draw):
    with cast_once([draw(4, 4, dtype=HALF), draw(4, 4).double()]):
        assert not casts._copies
    with cast_once([draw(4, 4)], torch.float32):
        assert not casts._copies
    with torch.inference_mode():
        inference = torch.randn(4, 4)
    with cast_once([inference]):
        assert torch.equal(cast(inference, HALF), inference.bfloat16())


def test_what_is_made_from_a_copy_is_made_once(weight, draw):
    """As the float32 copies of a CPU without bfloat16 instructions."""
    other, made = draw(24, 16), []

    def make(copy):
        made.append(copy)
        return copy.float()

    with torch.no_grad():
        with cast_once([weight]):
            widened = derived(weight, HALF, make)
            assert torch.equal(widened, weight.bfloat16().float()) and derived(weight, HALF, make) is widened
            assert torch.equal(derived(weight, HALF, torch.neg), -weight.bfloat16())
            assert derived(other, HALF, make) is not derived(other, HALF, make)
            with cast_once([weight, other]):
                assert derived(weight, HALF, make) is widened and derived(other, HALF, make) is derived(
                    other, HALF, make
                )
            weight.add_(1)
            with cast_once([weight]):
                assert torch.equal(derived(weight, HALF, make), weight.bfloat16().float())
        assert len(made) == 5 and not casts._copies
        assert derived(weight, HALF, make) is not widened


def test_what_is_made_from_joined_copies_is_made_once(draw):
    weights = [draw(8, 64) for _ in range(3)]
    with cast_once(weights):
        widened = derived(joined(weights, HALF), HALF, Tensor.float)
        assert torch.equal(widened, torch.cat(weights).bfloat16().float())
        assert derived(joined(weights, HALF), HALF, Tensor.float) is widened
    assert not casts._copies


def test_what_autograd_records_is_not_kept(weight):
    with cast_once([weight]):
        derived(weight, HALF, Tensor.float).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_a_cast_outside_an_operator_has_a_gradient(weight):
    with cast_once([weight]):
        cast(weight, HALF).float().sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_a_copy_has_the_strides_of_its_weight(draw):
    kernel = draw(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    with cast_once([draw(3, 3), kernel]):
        assert bfloat16_of(kernel).is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(bfloat16_of(kernel), kernel.bfloat16())
        assert bfloat16_of(kernel).storage_offset() == casts.ALIGNED


def test_joined_weights_are_the_concatenation(draw):
    weights, biases = [draw(n, 16) for n in (8, 4, 12)], [draw(n) for n in (8, 4, 12)]
    expected = torch.cat(weights).bfloat16()
    assert torch.equal(joined(weights, HALF), expected)
    with cast_once([*weights, *biases]):
        assert torch.equal(joined(weights, HALF), expected)
        assert joined(weights, HALF).data_ptr() == bfloat16_of(weights[0]).data_ptr()
        assert torch.equal(joined(weights[::-1], HALF), torch.cat(weights[::-1]).bfloat16())
        # Their sizes are no multiples of 64, so there are gaps between the copies.
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
def test_ops_use_the_copies_in_forward_and_backward(name, compiled, weight, draw, backend_name):
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

    expected = run(x)
    with cast_once([weight, bias]):
        actual = step(x)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        assert actual[2].dtype == torch.float32
    with cast_once([weight, bias]):
        bfloat16_of(weight).zero_()
        bfloat16_of(bias).zero_()
        y, d_x, *_ = step(x)
    assert not y.any()
    assert not d_x.any()
    assert all(torch.equal(a, b) for a, b in zip(step(x), expected, strict=True))


def test_float32_ops_do_not_use_the_copies(weight, draw):
    x, bias = draw(2, 3, 16), draw(24)
    expected = kernels.linear(x, weight, bias)
    with cast_once([weight, bias]):
        bfloat16_of(weight).zero_()
        assert torch.equal(kernels.linear(x, weight, bias), expected)


def test_matmul_weights_are_all_linears_but_the_time_embedding(tiny_config):
    model = UNITE.create(tiny_config.model, seed=0)
    parameters = dict(model.named_parameters())
    names = {next(n for n, p in parameters.items() if p is weight) for weight in matmul_weights(model)}
    linears = {
        n.rpartition(".")[0] for n, m in model.named_modules() for n in (f"{n}.weight",) if hasattr(m, "in_features")
    }
    left_out = {name for name in linears if f"{name}.weight" not in names}
    assert left_out == {"encoder.time_embed.fc1", "encoder.time_embed.fc2"}
    assert all(parameters[name].dim() <= 2 for name in names)
    assert SwiGLU(24).padding == 0


def test_lpips_uses_the_copies(draw, backend_name):
    weights = ({name: draw(*shape).abs() for name, shape in shapes.items()} for shapes in (VGG_SHAPES, LINEAR_SHAPES))
    lpips = LPIPS(*weights)
    image, recon = draw(1, 3, 16, 16), draw(1, 3, 16, 16)
    with torch.autocast("cpu", HALF), backend.using("reference"):
        expected = lpips(image, recon)
        with cast_once(lpips.matmul_weights()):
            assert torch.equal(lpips(image, recon), expected)
            for parameter in lpips.matmul_weights():
                bfloat16_of(parameter).zero_()
            assert not lpips(image, recon).any()
