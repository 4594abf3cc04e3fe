"""The fakes of every op promise the shapes, dtypes and strides that its backends return: for float32 and bfloat16 of
every input, as FSDP and autocast mix them."""

import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from unite_fast.kernels import backend
from unite_fast.kernels.fused_op import as_tuple
from unite_fast.kernels.registry import OPS, Size

FLOAT, HALF = torch.float32, torch.bfloat16
MIXED = list(itertools.product((FLOAT, HALF), repeat=3))
"""Dtypes of the residual, of other activations and modulation, of weights."""


def new(*shape, dtype=FLOAT, around=0.0):
    return (around + torch.randn(shape)).to(dtype)


def inputs(name: str, residual: torch.dtype, other: torch.dtype, weights: torch.dtype) -> tuple:
    """Inputs of `unite_fast::NAME`."""
    size = Size(2, 5, 16, heads=2, head_dim=8, hidden=12, residual=residual, other=other, weights=weights)
    return OPS[name].inputs(OPS[name].example(size, new))


def described(results) -> list[tuple]:
    return [(tuple(r.shape), r.dtype, r.stride() if r.numel() else None) for r in as_tuple(results)]


def test_every_operator_is_registered():
    """Every operator of ours whose gradient is an operator too."""
    names = {name.removesuffix("_backward") for name in dir(torch.ops.unite_fast) if name.endswith("_backward")}
    assert names - {"newton_schulz"} == set(OPS)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend_name", ["native", "triton"])
def test_fakes_match_the_results(name, backend_name):
    fused = OPS[name].fused
    if backend_name not in fused.backends:
        pytest.skip("it has no such backend")
    if missing := backend.why_missing(backend_name):
        pytest.skip(missing)
    if backend_name == "triton" and not backend.interpreted():
        pytest.skip("these tests' tensors are on the CPU")
    for dtypes in MIXED:
        given = inputs(name, *dtypes)
        with backend.using(backend_name):
            results = fused.backends[backend_name].forward(*given)
            incoming = [torch.ones_like(r) for r in results[: fused.results]]
            into_backward = (*incoming, *fused.saved(given, results))
            gradients = fused.backends[backend_name].backward(*into_backward)
            with FakeTensorMode() as mode:
                fakes, fakes_into_backward = tree_map_only(Tensor, mode.from_tensor, (given, into_backward))
                fake_results, fake_gradients = fused.op(*fakes), fused.backward_op(*fakes_into_backward)
        assert described(fake_results) == described(results), f"forward of {dtypes}"
        assert described(fake_gradients) == described(gradients), f"backward of {dtypes}"


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if "native" in op.fused.backends])
def test_opcheck_of_both_operators(name):
    if missing := backend.why_missing("native"):
        pytest.skip(missing)
    fused, checks = OPS[name].fused, ("test_schema", "test_faketensor")
    for dtypes in ((FLOAT, HALF, HALF), (HALF, HALF, FLOAT)):
        given = inputs(name, *dtypes)
        with backend.using("native"):
            torch.library.opcheck(fused.op, given, test_utils=checks)
            results = as_tuple(fused.op(*given))
            incoming = [torch.ones_like(r) for r in results[: fused.results]]
            torch.library.opcheck(fused.backward_op, (*incoming, *fused.saved(given, results)), test_utils=checks)
