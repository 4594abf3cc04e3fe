"""The byte counts of benchmarks/traffic.py against the inputs and outputs of the ops, and the ops that a block of the
model runs."""

import importlib
import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unite_fast.kernels import backend, native
from unite_fast.kernels.fused_op import as_tuple
from unite_fast.kernels.registry import OPS, Size
from unite_fast.model.decoder import DecoderLayer
from unite_fast.model.generative_encoder import Block
from unite_fast.model.layers import rope_table

FOLDER = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
TRITON_MODULES = ["adaln", "gelu", "layer_norm", "qk_norm_rope", "swiglu"]
needs_native = pytest.mark.skipif(bool(native.reason()), reason=native.reason())


@pytest.fixture
def traffic(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("traffic")


@pytest.fixture
def bench(traffic):
    """benchmarks/kernels.py, imported under a unique name."""
    spec = importlib.util.spec_from_file_location("benchmarks_kernels", FOLDER / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Counting(TorchDispatchMode):
    """Sums the bytes of the inputs and outputs of our ops, by op."""

    def __init__(self):
        super().__init__()
        self.moved = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace == "unite_fast":
            tensors = (x for x in tree_leaves((args, kwargs, results)) if isinstance(x, torch.Tensor))
            self.moved[func.name().removeprefix("unite_fast::")] += sum(x.nbytes for x in tensors)
        return results


@needs_native
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.part in ("block", "latents")])
def test_each_tensor_of_an_op_is_counted_once(name, bench, traffic):
    for case in bench.cases([name], [(2, 5, 192)], CPU):
        arguments = case.draw()
        leaves = [arguments[name] for name in case.op.gradients]
        with backend.using("native"), Counting() as counted:
            results = as_tuple(case.op.function(**arguments))
            torch.autograd.grad(results, leaves, [torch.ones_like(result) for result in results])
        unread = traffic.UNREAD[name](case.size) if name in traffic.UNREAD else (0, 0)
        moved = [sum(both) for both in zip(case.bytes, unread, strict=True)]
        assert counted.moved == {name: moved[0], f"{name}_backward": moved[1]}


def test_v_is_not_counted_in_qk_norm_rope(traffic):
    size = Size(2, 5, 192, heads=3, head_dim=64)
    q = k = v = 2 * 5 * 192 * 2
    weights, tables, rstd, bias = 2 * 64 * 4, 2 * 5 * 32 * 4, 2 * 5 * 2 * 3 * 4, 3 * 192 * 4
    forward = (q + k + weights + tables + bias) + (q + k + rstd)
    backward = (q + k + v) + (q + k + weights + tables + rstd) + (q + k + v + weights + bias)
    assert traffic.op_traffic(OPS["qk_norm_rope"], size) == (forward, backward)


@pytest.fixture(params=["native", "triton"])
def backend_name(request):
    if missing := backend.why_missing(request.param):
        pytest.skip(missing)
    with backend.using(request.param):
        yield request.param


@pytest.fixture
def runs(backend_name, monkeypatch):
    """Counts how often a backend runs each pass, by name."""
    counted = Counter()

    def counting(name, run):
        return lambda *inputs: (counted.update([name]), run(*inputs))[1]

    if backend_name == "native":
        run = native.run
        monkeypatch.setattr(native, "run", lambda name, *arguments: counting(name, run)(name, *arguments))
        return counted
    for module in (importlib.import_module(f"unite_fast.kernels.triton_kernels.{m}") for m in TRITON_MODULES):
        for name in [
            name for name in vars(module) if re.fullmatch(r"[a-z]\w+_(forward|backward|backward_recompute)", name)
        ]:
            monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return counted


def test_a_block_runs_the_ops_that_are_counted(backend_name, runs, traffic):
    device = torch.device("cuda" if backend_name == "triton" and not backend.interpreted() else "cpu")
    block = Block(32, heads=4, qk_norm=True).to(device)
    x, h = (torch.randn(2, 5, 32, device=device, requires_grad=True) for _ in range(2))
    vectors, weight = [torch.randn(2, 32, device=device) for _ in range(6)], torch.ones(32, device=device)
    tables = (table.to(device) for table in rope_table(5, 8))
    with torch.autocast(device.type, torch.bfloat16):
        results = block(x, h, vectors[:4], (weight, *vectors[4:]), *tables)
        sum(result.float().sum() for result in results).backward()
    expected = Counter(f"{op}_{direction}" for op in traffic.BLOCK_OPS for direction in ("forward", "backward"))
    if backend_name == "native":
        expected.update(f"{op}_forward" for op in traffic.RECOMPUTED)
    else:
        for op in traffic.RETURNED_BY_BACKWARD:
            expected[f"{op}_backward_recompute"] = expected.pop(f"{op}_backward")
    assert runs == expected


def test_the_bytes_of_a_block(traffic):
    """The sums of the module's docstring, and a little for what they omit."""
    for residual, r in ((torch.float32, 4), (torch.bfloat16, 2)):
        least = 10 * r + 86 + 2 / 3
        for arguments, expected in (
            (("native", False), least),
            (("native", True), least + r + 2 + 16 + 8),
            (("triton", False), least),
            (("triton", True), least + 2 + 16 / 3),
        ):
            assert expected < traffic.block_bytes(residual, *arguments) < expected + 0.6
    assert traffic.block_bytes(torch.float32) <= 130
    assert traffic.block_bytes(torch.float32, "triton", recompute=True) <= 135


def test_the_bytes_of_a_decoder_layer(traffic):
    for residual, r in ((torch.float32, 4), (torch.bfloat16, 2)):
        parts = traffic.decoder_layer_bytes(residual)
        expected = {"residuals and norms": 10 * r + 20, "gelu": 48, "gradient of qkv": 12}
        assert {name: round(size) for name, size in parts.items()} == expected
        assert all(0 <= size - expected[name] < 0.2 for name, size in parts.items())


def test_a_decoder_layer_runs_the_ops_that_are_counted(backend_name, runs):
    if backend_name == "native":
        pytest.skip("the count is of the Triton backend")
    device = torch.device("cpu" if backend.interpreted() else "cuda")
    layer = DecoderLayer(32, heads=4, mlp_width=128).to(device)
    x, branch = (torch.randn(2, 5, 32, device=device, requires_grad=True) for _ in range(2))
    with torch.autocast(device.type, torch.bfloat16):
        x_out, out, _ = layer(x, branch, torch.zeros(32, device=device))
        (x_out.sum() + out.float().sum()).backward()
    norms = ("residual_layer_norm_forward", "residual_layer_norm_backward_recompute")
    others = ("gelu_forward", "gelu_backward_recompute", "split_heads_backward")
    assert runs == Counter(dict.fromkeys(norms, 2) | dict.fromkeys(others, 1))
