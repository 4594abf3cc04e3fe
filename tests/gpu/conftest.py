"""The CUDA path: `pytest -m gpu`, which skips where there is no CUDA device. benchmarks/gpu.py runs these tests too.

`pytest -m gpu --gpu-device cpu tests/gpu` runs the same code on a CPU, with the C++ backends and at toy sizes. It tries
the tests, not the GPU.
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

# cuBLAS repeats its bits only with this, and reads it when a process first multiplies.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_spec = importlib.util.spec_from_file_location(
    "judge_of_kernels", Path(__file__).parents[1] / "kernels" / "conftest.py"
)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
judge, draw, op_case = _module.judge, _module.draw, _module.op_case


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("gpu_device"))


@pytest.fixture(scope="session")
def on_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


@pytest.fixture(autouse=True)
def backend_name(on_cuda: bool) -> Iterator[str]:
    """The fast backend of the device, by force."""
    name = "triton" if on_cuda else "native"
    with backend.using(name):
        yield name


@pytest.fixture(autouse=True)
def numerics() -> Iterator[None]:
    """float32 without TF32; what a test sets for the whole process ends with it."""
    with exact_float32():
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def sized(on_cuda: bool) -> Callable[..., tuple[int, ...]]:
    """Sizes as given on a GPU; on a CPU the toy sizes that follow them."""
    return lambda real, toy: real if on_cuda else toy


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Callable]:
    """The reference of an op, by the op's name."""
    return lambda op: OPS[op].reference


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN, so what a kernel leaves unwritten shows."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments, **options):
            made = make(*arguments, **options)
            if made.is_floating_point():
                made.detach().fill_(float("nan"))
            return made

        return call

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture
def judged(judge: Callable, record_property: Callable, poisoned: None) -> Callable[..., None]:
    """`judge`, which also notes how near to its tolerance the worst error is."""

    def run(*arguments) -> None:
        used = judge(*arguments)
        worst = max(used, key=used.get)
        record_property("worst", f"{worst}: {used[worst]:.2f} of the allowed error")

    return run


@pytest.fixture(scope="session")
def random_lpips() -> Callable[[], LPIPS]:
    """Makes LPIPS with random weights, on the CPU: the files of the real ones are not everywhere."""
    generator = torch.Generator().manual_seed(1)
    vgg = {
        name: torch.randn(shape, generator=generator) * (2 / max(1, torch.Size(shape[1:]).numel())) ** 0.5
        for name, shape in VGG_SHAPES.items()
    }
    linear = {name: torch.rand(shape, generator=generator) / shape[1] for name, shape in LINEAR_SHAPES.items()}
    return lambda: LPIPS(vgg, linear)
