"""The fakes of every op return the shapes, dtypes and strides of its backends, for every mix of float32 and bfloat16
inputs that FSDP and autocast may cause."""

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
EXAMPLES = [(name, variant) for name, op in OPS.items() for variant in op.examples]


def new(*shape, dtype=FLOAT, around=0.0):
    return (around + torch.randn(shape)).to(dtype)


def inputs(name: str, variant: str, residual: torch.dtype, other: torch.dtype, weights: torch.dtype) -> tuple:
    """Inputs of `unite_fast::NAME`."""
    size = Size(2, 5, 16, heads=2, head_dim=8, hidden=12, residual=residual, other=other, weights=weights)
    return OPS[name].inputs(OPS[name].examples[variant](size, new))


def metadata(results) -> list[tuple]:
    return [(tuple(r.shape), r.dtype, r.stride() if r.numel() else None) for r in as_tuple(results)]


def test_every_operator_is_registered():
    """The registry has all our operators with a backward operator."""
    names = {name.removesuffix("_backward") for name in dir(torch.ops.unite_fast) if name.endswith("_backward")}
    assert names - {"newton_schulz"} == set(OPS)


@pytest.mark.parametrize(("name", "variant"), EXAMPLES)
@pytest.mark.parametrize("backend_name", ["native", "triton"])
def test_fakes_match_the_backends(name, variant, backend_name):
    fused = OPS[name].fused
    if backend_name not in fused.backends:
        pytest.skip("this op has no such backend")
    if missing := backend.why_missing(backend_name):
        pytest.skip(missing)
    if backend_name == "triton" and not backend.interpreted():
        pytest.skip("the tensors of this test are on the CPU")
    for dtypes in MIXED:
        arguments = inputs(name, variant, *dtypes)
        # A bias with a gradient and one without.
        for x in arguments:
            if isinstance(x, Tensor) and x.is_leaf and x.is_floating_point():
                x.requires_grad_(dtypes[0] == FLOAT)
        with backend.using(backend_name), torch.no_grad():
            results = fused.backends[backend_name].forward(*arguments)
            incoming = [torch.ones_like(r) for r in fused.all_results(arguments, results)]
            into_backward = (*incoming, *fused.saved(arguments, results))
            gradients = fused.backends[backend_name].backward(*into_backward)
            with FakeTensorMode() as mode:
                fakes, fakes_into_backward = tree_map_only(Tensor, mode.from_tensor, (arguments, into_backward))
                fake_results, fake_gradients = fused.op(*fakes), fused.backward_op(*fakes_into_backward)
        assert metadata(fake_results) == metadata(results), f"forward of {dtypes}"
        assert metadata(fake_gradients) == metadata(gradients), f"backward of {dtypes}"


@pytest.mark.parametrize(("name", "variant"), [each for each in EXAMPLES if "native" in OPS[each[0]].fused.backends])
def test_opcheck_of_forward_and_backward(name, variant):
    if missing := backend.why_missing("native"):
        pytest.skip(missing)
    fused, checks = OPS[name].fused, ("test_schema", "test_faketensor")
    for dtypes in ((FLOAT, HALF, HALF), (HALF, HALF, FLOAT)):
        arguments = inputs(name, variant, *dtypes)
        with backend.using("native"):
            torch.library.opcheck(fused.op, arguments, test_utils=checks)
            results = as_tuple(fused.op(*arguments))
            incoming = [torch.ones_like(r) for r in fused.all_results(arguments, results)]
            torch.library.opcheck(fused.backward_op, (*incoming, *fused.saved(arguments, results)), test_utils=checks)
