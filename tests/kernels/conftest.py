"""Fixtures that compare ops with float64."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from unite_fast.kernels import backend, registry
from unite_fast.kernels.fused_op import as_tuple
from unite_fast.kernels.registry import OPS, Size

SLACK = 2.0
"""An op's error may be at most twice that of the plain formula at the same precision (CONTRIBUTING.md)."""
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Largest relative error of one rounding. Every result is rounded at least once, so an error up to this is allowed
even if the plain formula's own error happens to be smaller."""
EACH_ROUNDING = 1.1
"""Margin on the error of n independent roundings, sqrt(n) times that of one. Measured with float32 inside: 1.00 for
n = 1, up to 1.78 for n = 3 (1.03 sqrt(3)); with everything in bfloat16, 1.4 to 3.5."""

DRAWS = 8
"""Draws of arithmetic. Where a result is a few numbers, a small number of draws can all have small errors by luck (with
three, one of 2,200 results did: a loss of two samples). No backend's float32 result used more than 0.68 of its
tolerance in November 2026."""

LARGE = 2**18
"""Elements of all inputs. Above this, eager PyTorch sets the tolerance: the norm over so many elements hardly depends
on luck, and drawn arithmetic is slow, since it adds term by term."""

Op = Callable[..., Tensor | tuple[Tensor, ...]]


@pytest.fixture
def judge(drawn_arithmetic: Callable[[int], AbstractContextManager]) -> Callable[..., None]:
    return partial(_judge, drawn_arithmetic)


def _judge(
    drawn_arithmetic: Callable[[int], AbstractContextManager],
    op: Op,
    formula: Op,
    inputs: dict[str, Tensor],
    result_dtypes: tuple[torch.dtype, ...],
    roundings: int | None = 1,
) -> dict[str, float]:
    """Compare every output and every gradient of `op` with `formula` in float64.

    The tolerance is measured: one rounding plus SLACK times the largest error of `formula` over DRAWS draws of
    arithmetic in the inputs' precision (tests/drawn_arithmetic.py), so it does not depend on this machine's summation
    order. `roundings` counts the roundings to bfloat16 up to a result. With one, the result's own, the formula runs in
    float32. A bfloat16 result also may not be worse than the exact one after that many roundings, except with None, for
    the arithmetic of a library.

    Returns:
        error / tolerance of every output and gradient, by name.
    """
    truth = _run(formula, {name: x.double() for name, x in inputs.items()}, None)
    # If only the result is rounded, the formula may not round to bfloat16 in between either.
    single_rounding = roundings == 1
    cast_inputs = {name: x.float() if single_rounding else x for name, x in inputs.items()}
    eager = []
    large = sum(x.numel() for x in inputs.values()) > LARGE
    for arithmetic in [nullcontext()] if large else map(drawn_arithmetic, range(DRAWS)):
        with arithmetic:
            eager.append(_run(formula, cast_inputs, result_dtypes))
    ours = _run(op, inputs, None)
    for i, dtype in enumerate(result_dtypes):
        assert ours[f"output {i}"].dtype == dtype
    for name, x in inputs.items():
        assert ours[f"gradient of {name}"].dtype == x.dtype
    ratios = {}
    for name, exact in truth.items():
        size, dtype = exact.norm(), ours[name].dtype
        error = (ours[name].double() - exact).norm()
        allowed = (
            SLACK * max((other[name].to(dtype).double() - exact).norm() for other in eager) + ROUNDING[dtype] * size
        )
        if dtype == torch.bfloat16 and roundings is not None:
            allowed = min(allowed, EACH_ROUNDING * roundings**0.5 * (exact.to(dtype).double() - exact).norm())
        assert error <= allowed, f"{name}: error {error / size:.2e}, allowed {allowed / size:.2e}"
        ratios[name] = (error / allowed).item() if error else 0.0
    return ratios


def _run(op: Op, inputs: dict[str, Tensor], result_dtypes: tuple[torch.dtype, ...] | None) -> dict[str, Tensor]:
    """Outputs and gradients by name. The incoming gradients are not contiguous."""
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = as_tuple(op(*inputs.values()))
    if result_dtypes:
        outputs = tuple(output.to(dtype) for output, dtype in zip(outputs, result_dtypes, strict=True))
    generator = torch.Generator().manual_seed(2)
    incoming = []
    for output in outputs:
        transposed = torch.randn(output.mT.shape, generator=generator)
        # Rounded to bfloat16 for all, so that every run sees the same numbers.
        incoming.append(transposed.bfloat16().to(output).mT)
    gradients = torch.autograd.grad(outputs, list(inputs.values()), incoming)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return results | {f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}


@pytest.fixture(params=["reference", "native", "triton"])
def backend_name(request) -> Iterator[str]:
    """Runs the test with each backend."""
    if missing := backend.why_missing(request.param):
        pytest.skip(missing)
    with backend.using(request.param):
        yield request.param


@pytest.fixture(params=["native", "triton"])
def fast_backend_on_a_cpu(request) -> Iterator[str]:
    """Runs the test with each fast backend, for tests with tensors on the CPU."""
    if missing := backend.why_missing(request.param):
        pytest.skip(missing)
    if request.param == "triton" and not backend.interpreted():
        pytest.skip("the tensors of this test are on the CPU")
    with backend.using(request.param):
        yield request.param


@pytest.fixture
def device(request) -> torch.device:
    """The device of a test's tensors: the GPU if the Triton backend runs on one, else the CPU."""
    backend_name = request.getfixturevalue("backend_name") if "backend_name" in request.fixturenames else ""
    return torch.device("cuda" if backend_name == "triton" and not backend.interpreted() else "cpu")


@pytest.fixture
def draw(device: torch.device) -> Callable[..., Tensor]:
    """Draws normal numbers: new ones in each call, the same ones in every run and on every device."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, dtype: torch.dtype = torch.float32, around: float = 0.0) -> Tensor:
        return (around + torch.randn(shape, generator=generator)).to(device, dtype)

    return normal


@dataclass
class Call:
    """Calls an op or its reference with the tensors that get a gradient; returns a tuple. If they are float64, all
    other tensors and dtypes are too."""

    op: registry.Op
    function: Callable
    example: dict
    names: list[str]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        example = self.example | dict(zip(self.names, inputs, strict=True))
        if inputs[0].dtype == torch.float64:
            example = {name: _to_float64(value) for name, value in example.items()}
        return as_tuple(self.function(**example))


def _to_float64(value):
    if isinstance(value, torch.dtype):
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.fixture
def op_case(draw: Callable[..., Tensor]) -> Callable[[str, Size], tuple[Call, Call, dict[str, Tensor]]]:
    """Makes (op, reference, inputs with a gradient) for an op's name and a size."""

    def make(name: str, size: Size) -> tuple[Call, Call, dict[str, Tensor]]:
        op = OPS[name]
        example = op.example(size, draw)
        function, reference = (Call(op, f, example, op.gradients) for f in (op.function, op.reference))
        return function, reference, {name: example[name].detach().requires_grad_() for name in op.gradients}

    return make
