"""The judge of all ops: float64."""

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
"""Largest relative error of one rounding. Every result is rounded at least once, so no error below this can be held
against an op, however lucky the plain formula was."""
EACH_ROUNDING = 1.1
"""n independent roundings make sqrt(n) times the error of one, give or take chance. Measured with float32 inside: 1.00
for n = 1, up to 1.78 for n = 3 (1.03 sqrt(3)); with all of it in bfloat16, 1.4 to 3.5."""

DRAWS = 8
"""Of drawn arithmetic: few of them can all be lucky where a result is a few numbers (of 2,200 results three draws were
so for one, a loss of two samples). No backend's float32 result had more than 0.68 of its tolerance in November 2026."""

LARGE = 2**18
"""Numbers of all inputs. Above, eager PyTorch is the yardstick: norms over so many average its luck out, and a draw
takes a sum term by term."""

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
    """Hold every output and every gradient of `op` against `formula` in float64.

    The tolerance measures itself: it is the largest error of `formula` in a few draws of arithmetic in the inputs'
    precision (see tests/drawn_arithmetic.py), so that it does not rest on what this machine's orders of sums happen to
    give. With one rounding to bfloat16, the result's own, that arithmetic is float32 throughout. With more, a bfloat16
    result must besides be no worse than the truth after so many roundings; None where the arithmetic is a library's.

    Returns:
        What part of its tolerance each error uses up, by name.
    """
    truth = _run(formula, {name: x.double() for name, x in inputs.items()}, None)
    # Where no rounding but the result's is granted, the formula may not lose more than that to bfloat16 either.
    exact = roundings == 1
    given = {name: x.float() if exact else x for name, x in inputs.items()}
    eager = []
    large = sum(x.numel() for x in inputs.values()) > LARGE
    for arithmetic in [nullcontext()] if large else map(drawn_arithmetic, range(DRAWS)):
        with arithmetic:
            eager.append(_run(formula, given, result_dtypes))
    ours = _run(op, inputs, None)
    for i, dtype in enumerate(result_dtypes):
        assert ours[f"output {i}"].dtype == dtype
    for name, x in inputs.items():
        assert ours[f"gradient of {name}"].dtype == x.dtype
    used = {}
    for name, want in truth.items():
        size, dtype = want.norm(), ours[name].dtype
        error = (ours[name].double() - want).norm()
        allowed = (
            SLACK * max((other[name].to(dtype).double() - want).norm() for other in eager) + ROUNDING[dtype] * size
        )
        if dtype == torch.bfloat16 and roundings is not None:
            allowed = min(allowed, EACH_ROUNDING * roundings**0.5 * (want.to(dtype).double() - want).norm())
        assert error <= allowed, f"{name}: error {error / size:.2e}, allowed {allowed / size:.2e}"
        used[name] = (error / allowed).item() if error else 0.0
    return used


def _run(op: Op, inputs: dict[str, Tensor], result_dtypes: tuple[torch.dtype, ...] | None) -> dict[str, Tensor]:
    """Outputs and gradients by name. The incoming gradients are not contiguous."""
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = as_tuple(op(*inputs.values()))
    if result_dtypes:
        outputs = tuple(output.to(dtype) for output, dtype in zip(outputs, result_dtypes, strict=True))
    generator = torch.Generator().manual_seed(2)
    incoming = []
    for output in outputs:
        turned = torch.randn(output.mT.shape, generator=generator)
        # Rounded to bfloat16 for all, so that every run sees the same numbers.
        incoming.append(turned.bfloat16().to(output).mT)
    gradients = torch.autograd.grad(outputs, list(inputs.values()), incoming)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return results | {f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}


@pytest.fixture(params=["reference", "native", "triton"])
def backend_name(request) -> Iterator[str]:
    """Each backend in turn."""
    if missing := backend.why_missing(request.param):
        pytest.skip(missing)
    with backend.using(request.param):
        yield request.param


@pytest.fixture(params=["native", "triton"])
def fast_backend_on_a_cpu(request) -> Iterator[str]:
    """Each fast backend in turn, for tests whose tensors are on the CPU."""
    if missing := backend.why_missing(request.param):
        pytest.skip(missing)
    if request.param == "triton" and not backend.interpreted():
        pytest.skip("these tests' tensors are on the CPU")
    with backend.using(request.param):
        yield request.param


@pytest.fixture
def device(request) -> torch.device:
    """Where the tensors of a test are: a GPU where the Triton backend runs on one, else the CPU."""
    backend_name = request.getfixturevalue("backend_name") if "backend_name" in request.fixturenames else ""
    return torch.device("cuda" if backend_name == "triton" and not backend.interpreted() else "cpu")


@pytest.fixture
def draw(device: torch.device) -> Callable[..., Tensor]:
    """Normal numbers, each call others, the same in every run and on every device."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, dtype: torch.dtype = torch.float32, around: float = 0.0) -> Tensor:
        return (around + torch.randn(shape, generator=generator)).to(device, dtype)

    return normal


@dataclass
class Call:
    """The public function of an op or its reference, called with the tensors that get a gradient; returns a tuple. In
    float64, everything else is float64 too."""

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
    """Makes (op, reference, inputs with a gradient) for the name of an op and a size."""

    def make(name: str, size: Size) -> tuple[Call, Call, dict[str, Tensor]]:
        op = OPS[name]
        example = op.example(size, draw)
        function, reference = (Call(op, f, example, op.gradients) for f in (op.function, op.reference))
        return function, reference, {name: example[name].detach().requires_grad_() for name in op.gradients}

    return make
