"""With kernels=auto and bfloat16 autocast, torch.compile makes one graph of a block, a decoder layer, or LPIPS.

Graphs for a GPU are tested without one: Dynamo traces fake tensors. This only needs a torch that was built with CUDA.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from unite_fast.kernels import backend
from unite_fast.kernels.float8 import float8_matmuls
from unite_fast.lpips import LINEAR_SHAPES, LPIPS, VGG_SHAPES
from unite_fast.model.decoder import DecoderLayer
from unite_fast.model.generative_encoder import Block
from unite_fast.randomness import Philox

B, T, D, HEADS, SIDE = 2, 24, 64, 4, 32

on_cuda = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA"),
)


def block():
    modulation = torch.empty(B, 6 * D, dtype=torch.bfloat16).chunk(6, dim=-1)
    tables = (torch.empty(T, D // HEADS // 2) for _ in range(2))
    x, h = torch.empty(B, T, D, requires_grad=True), torch.empty(B, T, D)
    return Block(D, HEADS, qk_norm=True), (x, h, modulation[2:], (torch.empty(D), *modulation[:2]), *tables)


def decoder_layer():
    return DecoderLayer(D, HEADS, 2 * D), (torch.empty(B, T, D, requires_grad=True),)


def lpips():
    weights = ({name: torch.empty(shape) for name, shape in shapes.items()} for shapes in (VGG_SHAPES, LINEAR_SHAPES))
    recon = torch.empty(B, 3, SIDE, SIDE, requires_grad=True)
    return LPIPS(*weights), (torch.empty(B, 3, SIDE, SIDE), recon, Philox(1, 2, torch.arange(B)))


@contextmanager
def autocast(device: str) -> Iterator[None]:
    """Like torch.autocast, which would disable itself without a GPU."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


@pytest.mark.parametrize(
    ("make", "in_float8"),
    [(block, False), (block, True), (decoder_layer, False), (decoder_layer, True), (lpips, False)],
)
@pytest.mark.parametrize("device", ["cpu", on_cuda])
def test_the_module_compiles_to_one_graph(make, in_float8, device):
    """With the backward pass on the CPU only: for fake CUDA tensors, autograd's engine would need a GPU's streams."""
    torch._dynamo.reset()
    with backend.using("auto"), float8_matmuls(in_float8), FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(device):
            module, inputs = make()
        if device == "cuda":
            assert backend.backend_on(torch.device(device)) == "triton"
            with autocast(device):
                explanation = torch._dynamo.explain(module)(*inputs)
                torch._dynamo.reset()
                torch.compile(module, backend="eager", fullgraph=True)(*inputs)
            assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)
            return
        with autocast(device):
            outputs = torch.compile(module, backend="aot_eager", fullgraph=True)(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(output.float().sum() for output in outputs if output is not None).backward()
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
