"""Attention backends: the requested one runs, in one graph, or is refused in one line that says why."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unite_fast.errors import UserError
from unite_fast.kernels import attention_backends, backend, flash
from unite_fast.kernels.attention import attention_ref
from unite_fast.kernels.attention_backends import ATTEND, ON_CPU
from unite_fast.recipes import load_config
from unite_fast.training.trainer import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPERATORS = {
    "sdpa_cudnn": "_scaled_dot_product_cudnn_attention",
    "sdpa_flash": "_scaled_dot_product_flash_attention",
    "sdpa_efficient": "_scaled_dot_product_efficient_attention",
}


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def packed(b=2, tokens=5, heads=3, width=8):
    """q, k and v on the meta device, where CUDA operators give shapes without a GPU."""
    return torch.empty(b, tokens, 3 * heads * width, device="meta", dtype=torch.bfloat16, requires_grad=True)


def test_an_unknown_name_is_refused_with_the_known_names():
    assert ("sdpa", *OPERATORS, "flash_attn", "sdpa_bfloat16", "sdpa_float32") == backend.ATTENTION_NAMES
    with pytest.raises(UserError, match="there is no 'fast'; choose one of sdpa, sdpa_cudnn"):
        backend.use_attention("fast", CPU)


@pytest.mark.parametrize("name", [*OPERATORS, "flash_attn"])
def test_a_cuda_backend_is_refused_on_a_cpu(name, tiny_run, tmp_path):
    settings = (*tiny_run, f"attention={name}", f"train.out={tmp_path / 'run'}")
    with pytest.raises(UserError, match=f"attention: {name} cannot run here: it is for CUDA, and the device is cpu"):
        train(load_config("digits", settings))
    assert backend.attention_on(CUDA) == "sdpa", "unchanged"
    assert not (tmp_path / "run").exists()


def test_the_precisions_of_a_cpu(monkeypatch):
    for name in ON_CPU:
        with pytest.raises(UserError, match=f"{name} cannot run here: it is for a CPU, and the device is cuda"):
            backend.use_attention(name, CUDA)
        backend.use_attention(name, CPU)
        assert backend.attention_on(CPU) == name and backend.attention_on(CUDA) == "sdpa"
    backend.use_attention("sdpa_float32", CPU, torch.float32)
    with pytest.raises(UserError, match=r"sdpa_bfloat16 .* takes no float32; set train\.precision=bfloat16"):
        backend.use_attention("sdpa_bfloat16", CPU, torch.float32)


@pytest.mark.parametrize("name", ON_CPU)
def test_the_reference_attends_in_the_chosen_precision(name, draw):
    qkv = draw(2, 70, 48, dtype=torch.bfloat16)
    backend.use_attention(name, CPU)
    actual = attention_ref(qkv, 2, None, None, None, None)
    backend.use_attention("sdpa", CPU)
    expected = attention_ref(qkv.float() if name == "sdpa_float32" else qkv, 2, None, None, None, None)
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected.bfloat16())


@pytest.mark.parametrize(("name", "operator"), OPERATORS.items())
@pytest.mark.parametrize("token_range", [None, (1, 4)])
def test_each_backend_calls_its_operator_forward_and_backward_in_one_graph(name, operator, token_range, monkeypatch):
    monkeypatch.setattr(backend, "attention_on", lambda device: name)
    qkv = packed()

    def attend(qkv):
        return attention_ref(qkv, 3, None, None, None, None, token_range)

    with Operators() as run:
        out = attend(qkv)
        out.sum().backward()
    assert out.shape == (2, 3 if token_range else 5, 24) and qkv.grad.shape == qkv.shape
    assert [called for called in run.names if "attention" in called] == [operator, f"{operator}_backward"]
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(attend, backend=record, fullgraph=True)
    assert compiled(packed()).shape == out.shape
    assert len(graphs) == 1 and operator in graphs[0].code


def test_a_change_of_backend_recompiles(monkeypatch):
    """A compiled block must not keep the earlier backend."""
    graphs = []

    def record(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    monkeypatch.setattr(backend, "attention_on", lambda device: backend._attention)
    compiled = torch.compile(lambda qkv: attention_ref(qkv, 3, None, None, None, None), backend=record, fullgraph=True)
    for name in OPERATORS:
        monkeypatch.setattr(backend, "_attention", name)
        compiled(packed())
    assert [operator in code for operator, code in zip(OPERATORS.values(), graphs, strict=True)] == [True] * 3


def test_an_error_of_the_device_is_one_line(monkeypatch):
    def refuse(q, k, v):
        raise RuntimeError("No kernel for heads of this width\nException raised from somewhere")

    monkeypatch.setitem(ATTEND, "sdpa_flash", refuse)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **rest: torch.ones(*shape, **rest))
    with pytest.raises(UserError, match="cannot run here: with heads of width 12: No kernel") as caught:
        backend.use_attention("sdpa_flash", CUDA, torch.bfloat16, (72, 12))
    assert "\n" not in str(caught.value)
    for name in ("sdpa_cudnn", "sdpa_flash", "flash_attn"):
        with pytest.raises(UserError, match=r"takes no float32; set train\.precision=bfloat16"):
            backend.use_attention(name, CUDA, torch.float32)
    monkeypatch.setitem(ATTEND, "sdpa_efficient", torch.nn.functional.scaled_dot_product_attention)
    backend.use_attention("sdpa_efficient", CUDA, torch.float32, (12,))
    assert backend.attention_on(CUDA) == "sdpa_efficient" and backend.attention_on(CPU) == "sdpa"


@pytest.mark.parametrize("returns_tuple", [False, True], ids=["one result", "with the sums"])
def test_flash_attn_is_called_in_its_own_layout(monkeypatch, returns_tuple):
    def function(q, k, v):
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return (out, None) if returns_tuple else out

    monkeypatch.setattr(flash, "_function", None)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(flash, "find", lambda: (4, function))
        assert flash.why_missing() == ""
    q, k, v = torch.randn(3, 2, 3, 5, 8).unbind()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(ATTEND["flash_attn"](q, k, v), expected)
    compiled = torch.compile(ATTEND["flash_attn"], backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ATTEND)
@pytest.mark.parametrize("width", [64, 72])
def test_against_float64(name, width):
    if missing := attention_backends.why_missing(name, CUDA, torch.bfloat16, (width,)):
        pytest.skip(missing)
    generator = torch.Generator(CUDA).manual_seed(0)
    q, k, v, d_out = (torch.randn(2, 4, 257, width, generator=generator, device=CUDA) for _ in range(4))

    def run(attend, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q.bfloat16(), k.bfloat16(), v.bfloat16())]
        out = attend(*inputs)
        out.backward(d_out.bfloat16().to(dtype))
        return [out.detach(), *(x.grad for x in inputs)]

    def plain(q, k, v):
        return (q @ k.transpose(2, 3) / width**0.5).softmax(-1) @ v

    exact, reference = run(plain, torch.float64), run(plain, torch.bfloat16)
    for actual, eager, truth in zip(run(ATTEND[name], torch.bfloat16), reference, exact, strict=True):
        # Fused attention keeps its scores in float32, so it is at least as close as matmuls in bfloat16.
        assert (actual - truth).abs().max() <= 2 * (eager - truth).abs().max()
