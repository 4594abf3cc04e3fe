"""Bytes of LPIPS by arithmetic against those of its operators, and the targets of this project."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unite_fast.kernels import backend
from unite_fast.kernels.casts import cast_once
from unite_fast.lpips import LINEAR_SHAPES, LPIPS, VGG_SHAPES
from unite_fast.planning.lpips import elements, lpips_bytes, lpips_saved
from unite_fast.randomness import Philox

MOST_MOVED, MOST_SAVED = 350e6, 90e6
"""Bytes per image at 256 x 256, biases included. Plain PyTorch moves 2.28e9 without them."""


def test_the_targets():
    assert lpips_bytes(256) <= MOST_MOVED and lpips_saved(256) <= MOST_SAVED


def test_all_convolutions_and_poolings_are_counted():
    convolutions, taps, pooled = elements(32)
    outputs = [2 * [64 * 32**2], 2 * [128 * 16**2], 3 * [256 * 8**2], 3 * [512 * 4**2], 3 * [512 * 2**2]]
    assert convolutions + taps == sum(map(sum, outputs)) and taps == sum(block[-1] for block in outputs)
    assert pooled == sum(block[-1] for block in outputs[:-1]) // 4
    assert elements(37).pooled == 64 * 18**2 + 128 * 9**2 + 256 * 4**2 + 512 * 2**2


class Traffic(TorchDispatchMode):
    """Counts the bytes of the inputs and outputs of operators, without convolutions and views."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        # FakeTensorMode asks for devices with an operator.
        allocates = name in ("detach", "empty", "empty_like", "new_empty")
        if not (allocates or function.is_view or function.namespace == "prim") and "convolution" not in name:
            tensors = (x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
            self.size += sum(x.nbytes for x in tensors)
        return out


@pytest.mark.skipif(bool(backend.why_missing("triton")), reason=backend.why_missing("triton") or "here")
@pytest.mark.parametrize("side", [256, 125])
def test_the_bytes_are_those_of_the_operators(side):
    """Tensors without memory are enough."""
    device = "cpu" if backend.interpreted() else "cuda"
    with FakeTensorMode(), torch.device(device), backend.using("triton"):
        shapes = (VGG_SHAPES, LINEAR_SHAPES)
        lpips = LPIPS(*({name: torch.empty(shape) for name, shape in each.items()} for each in shapes))
        image, recon = torch.rand(1, 3, side, side), torch.rand(1, 3, side, side, requires_grad=True)
        philox = Philox(0, 0, torch.arange(1))
        with torch.autocast(device, torch.bfloat16), cast_once(lpips.matmul_weights()), Traffic() as traffic:
            torch.autograd.grad(lpips(image, recon, philox).sum(), recon)
    assert traffic.size == pytest.approx(lpips_bytes(side), rel=1e-3)
