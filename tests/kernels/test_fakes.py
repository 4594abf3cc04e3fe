"""What an operator promises a compiler, shapes, types and strides, is what its bodies give: for float32 and bfloat16 of
every input, as FSDP and autocast mix them."""

import importlib
import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from unite_fast.kernels import backend, op

FLOAT, HALF = torch.float32, torch.bfloat16
B, T, D, N, HEADS = 2, 5, 16, 12, 2
OPS = [
    "adaln_modulate",
    "attention",
    "flow_loss",
    "gated_residual_adaln",
    "gated_residual_norm_adaln",
    "noise_injection",
    "qk_norm_rope",
    "swiglu",
    "tap_distance",
]
LINEARS = [
    "linear",
    "gelu_linear",
    "gated_residual_adaln_linear",
    "layer_norm_linear",
    "residual_layer_norm_linear",
    "swiglu_linear",
]
FUSED = {name: importlib.import_module(f"unite_fast.kernels.{name}")._fused for name in OPS}
FUSED |= {name: getattr(importlib.import_module("unite_fast.kernels.linear"), f"_{name}") for name in LINEARS}
MIXED = list(itertools.product((FLOAT, HALF), repeat=3))
"""Of the main input, of other activations and modulation, of weights."""


def arguments(name: str, x: torch.dtype, other: torch.dtype, weights: torch.dtype) -> tuple:
    """All of unite_fast::NAME."""

    def tensor(*shape, dtype):
        return torch.randn(*shape).to(dtype)

    rows, vector, norm = tensor(B, T, D, dtype=x), tensor(B, 3 * D, dtype=other)[:, :D], tensor(D, dtype=weights)
    branch, times = tensor(B, T, D, dtype=other), torch.rand(3, B)
    product = tensor(N, D, dtype=weights), tensor(N, dtype=weights)
    heads = tensor(D // HEADS, dtype=weights), tensor(D // HEADS, dtype=weights)
    tables = torch.rand(T, D // HEADS // 2), torch.rand(T, D // HEADS // 2)
    features = torch.rand(B, 32, 4, 3).to(x, memory_format=torch.channels_last)
    channels = tensor(32, dtype=weights)
    return {
        "adaln_modulate": (rows, norm, vector, vector, 1e-6, other),
        "gated_residual_adaln": (rows, branch, vector, norm, vector, vector, 1e-6, other),
        "gated_residual_norm_adaln": (rows, branch, vector, norm, norm, vector, vector, 1e-6, other),
        "qk_norm_rope": (tensor(B, T, 3 * D, dtype=x), *heads, *tables, HEADS, 1e-6),
        "swiglu": (rows,),
        "flow_loss": (tensor(3, B, T, D, dtype=x), norm, norm, tensor(B, T, D, dtype=other), times, 0.05, 1e-5),
        "noise_injection": (rows, times, torch.arange(B), torch.tensor([True, False]), 1, 2, 3, 4),
        "attention": (tensor(B, T, 3 * D, dtype=x), *heads, *tables, HEADS, 1, T),
        "tap_distance": (features, features, channels, torch.ones_like(features, dtype=torch.uint8)),
        "linear": (rows, *product),
        "swiglu_linear": (tensor(B, T, 2 * D, dtype=x), *product),
        "gelu_linear": (rows, *product),
        "layer_norm_linear": (rows, norm, norm, *product, 1e-6, other),
        "residual_layer_norm_linear": (rows, branch, norm, norm, *product, 1e-6, other),
        "gated_residual_adaln_linear": (rows, branch, vector, norm, vector, vector, *product, other),
    }[name]


def described(results) -> list[tuple]:
    results = results if isinstance(results, tuple) else (results,)
    return [(tuple(r.shape), r.dtype, r.stride() if r.numel() else None) for r in results]


def test_every_operator_is_here():
    """Of those whose gradient is an operator too."""
    names = {name.removesuffix("_backward") for name in dir(torch.ops.unite_fast) if name.endswith("_backward")}
    assert names - {"newton_schulz"} == set(FUSED)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("body", ["native", "triton"])
def test_fakes_are_like_what_the_bodies_give(name, body):
    fused = FUSED[name]
    if body not in fused.bodies:
        pytest.skip("it has no such body")
    if missing := backend.why_missing(body):
        pytest.skip(missing)
    if body == "triton" and not backend.interpreted():
        pytest.skip("these tests' tensors are on the CPU")
    for dtypes in MIXED:
        given = arguments(name, *dtypes)
        with backend.using(body):
            results = fused.bodies[body].forward(*given)
            incoming = [torch.ones_like(r) for r in results[: fused.results]]
            into_backward = (*incoming, *fused.saved(given, results))
            gradients = fused.bodies[body].backward(*into_backward)
            with FakeTensorMode() as mode:
                fakes, fakes_into_backward = tree_map_only(Tensor, mode.from_tensor, (given, into_backward))
                like, like_gradients = fused.op(*fakes), fused.backward_op(*fakes_into_backward)
        assert described(like) == described(results), f"forward of {dtypes}"
        assert described(like_gradients) == described(gradients), f"backward of {dtypes}"


@pytest.mark.parametrize("name", [name for name in FUSED if "native" in FUSED[name].bodies])
def test_opcheck_of_both_operators(name):
    if missing := backend.why_missing("native"):
        pytest.skip(missing)
    fused, checks = FUSED[name], ("test_schema", "test_faketensor")
    for dtypes in ((FLOAT, HALF, HALF), (HALF, HALF, FLOAT)):
        given = arguments(name, *dtypes)
        with backend.using("native"):
            torch.library.opcheck(fused.op, given, test_utils=checks)
            results = op._as_tuple(fused.op(*given))
            incoming = [torch.ones_like(r) for r in results[: fused.results]]
            torch.library.opcheck(fused.backward_op, (*incoming, *fused.saved(given, results)), test_utils=checks)
