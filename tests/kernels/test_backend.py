import re

import numpy as np
import pytest
import torch

from unite_fast import kernels
from unite_fast.errors import UserError
from unite_fast.kernels import backend, native
from unite_fast.kernels.swiglu import swiglu_ref

needs_native = pytest.mark.skipif(not native.available(), reason=native.reason() or "built")


@pytest.fixture(autouse=True)
def restore_backend():
    before = backend.current()
    yield
    backend.use(before)


@pytest.fixture
def native_is_missing(monkeypatch):
    monkeypatch.setattr(native, "_missing", "no compiler was found")


def grad_fn_of(x: torch.Tensor) -> str:
    return type(kernels.swiglu(x.requires_grad_()).grad_fn).__name__


@pytest.mark.parametrize("name", ["auto", "reference", pytest.param("native", marks=needs_native)])
def test_the_chosen_backend_is_current(name):
    backend.use(name)
    assert backend.current() == name
    assert name in backend.available()


def test_an_unknown_backend_is_refused():
    with pytest.raises(UserError, match="no backend 'fast'; choose one of auto, reference, native, triton"):
        backend.use("fast")


def test_a_missing_backend_is_refused_and_changes_nothing(native_is_missing):
    backend.use("reference")
    with pytest.raises(UserError, match="the native backend is missing: no compiler was found"):
        backend.use("native")
    assert backend.current() == "reference"
    assert "native" not in backend.available()


def test_auto_falls_back_to_the_reference_without_native(native_is_missing):
    backend.use("auto")
    assert grad_fn_of(torch.randn(3, 8)) != "swigluBackward"


@pytest.mark.skipif(not backend.interpreted(), reason="Triton's interpreter is off")
@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "fits"),
    [
        ("3.6.0", "2.3.5", True),
        ("3.6.0", "2.4.0", False),
        ("3.6.0+git12", "3.0.0rc1", False),
        ("3.10.0", "2.10.1", True),
    ],
)
def test_triton_is_missing_where_numpy_breaks_its_interpreter(triton_version, numpy_version, fits, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", triton_version)
    monkeypatch.setattr(np, "__version__", numpy_version)
    if fits:
        return backend.use("triton")
    with pytest.raises(UserError, match=rf"triton {re.escape(triton_version)} .* numpy {numpy_version}; .*numpy<2\.4"):
        backend.use("triton")


@needs_native
def test_auto_and_native_run_the_cpp_op():
    backends = {}
    for name in ("auto", "native", "reference"):
        backend.use(name)
        backends[name] = grad_fn_of(torch.randn(3, 8))
    assert backends["auto"] == backends["native"] == "swigluBackward" != backends["reference"]


@needs_native
@pytest.mark.parametrize("name", ["auto", "native"])
def test_float64_runs_the_reference(name):
    backend.use(name)
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(kernels.swiglu(x), swiglu_ref(x))


@needs_native
def test_inputs_without_native_support_run_the_reference_or_are_refused():
    x = torch.randn(3, 8).half()
    backend.use("auto")
    assert torch.equal(kernels.swiglu(x), swiglu_ref(x))
    backend.use("native")
    with pytest.raises(UserError, match=r"not torch.float16 on cpu"):
        kernels.swiglu(x)
    with pytest.raises(UserError, match=r"not torch.float32 on meta"):
        kernels.swiglu(torch.empty(3, 8, device="meta"))
    with pytest.raises(UserError, match=r"not torch.float32 to torch.float16 on cpu"):
        kernels.adaln_modulate(
            torch.randn(2, 3, 8), torch.ones(8), torch.ones(2, 8), torch.ones(2, 8), out_dtype=torch.half
        )
