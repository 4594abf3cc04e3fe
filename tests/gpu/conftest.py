"""Tests of the CUDA path: `pytest -m gpu`. They skip without a CUDA device. benchmarks/gpu.py runs them too.

`pytest -m gpu --gpu-device cpu tests/gpu` runs the same code on a CPU, with the C++ backends and at toy sizes, to check
the tests themselves.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unite_fast.kernels import backend
from unite_fast.kernels.registry import OPS
from unite_fast.lpips import LINEAR_SHAPES, LPIPS, VGG_SHAPES
from unite_fast.utils.device import exact_float32

# cuBLAS is deterministic only with this. It reads it at a process's first matmul.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_spec = importlib.util.spec_from_file_location(
    "kernels_conftest", Path(__file__).parents[1] / "kernels" / "conftest.py"
)
_kernels_conftest = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_kernels_conftest)
judge, draw, op_case = _kernels_conftest.judge, _kernels_conftest.draw, _kernels_conftest.op_case


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("gpu_device"))


@pytest.fixture(scope="session")
def on_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


@pytest.fixture(autouse=True)
def backend_name(on_cuda: bool) -> Iterator[str]:
    """Forces the fast backend of the device."""
    name = "triton" if on_cuda else "native"
    with backend.using(name):
        yield name


@pytest.fixture(autouse=True)
def numerics() -> Iterator[None]:
    """float32 without TF32. Resets what a test sets for the whole process."""
    with exact_float32():
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def size_for_device(on_cuda: bool) -> Callable[..., tuple[int, ...]]:
    """Returns its first argument on a GPU, the toy size after it on a CPU."""
    return lambda real, toy: real if on_cuda else toy


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Callable]:
    """The reference of an op, by the op's name."""
    return lambda op: OPS[op].reference


@pytest.fixture
def poison_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills new memory with NaN, so that elements which a kernel leaves unwritten fail the test."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments, **options):
            tensor = make(*arguments, **options)
            if tensor.is_floating_point():
                tensor.detach().fill_(float("nan"))
            return tensor

        return call

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture
def judge_and_record(judge: Callable, record_property: Callable, poison_memory: None) -> Callable[..., None]:
    """`judge`, which also records the largest ratio of error to tolerance."""

    def run(*arguments) -> None:
        ratios = judge(*arguments)
        worst = max(ratios, key=ratios.get)
        record_property("worst", f"{worst}: {ratios[worst]:.2f} of the allowed error")

    return run


@pytest.fixture(scope="session")
def random_lpips() -> Callable[[], LPIPS]:
    """Makes LPIPS with random weights, on the CPU, since not every machine has the published weights."""
    generator = torch.Generator().manual_seed(1)
    vgg = {
        name: torch.randn(shape, generator=generator) * (2 / max(1, torch.Size(shape[1:]).numel())) ** 0.5
        for name, shape in VGG_SHAPES.items()
    }
    linear = {name: torch.rand(shape, generator=generator) / shape[1] for name, shape in LINEAR_SHAPES.items()}
    return lambda: LPIPS(vgg, linear)
