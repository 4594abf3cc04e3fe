"""The cases of kernels.py for pytest-benchmark, which keeps runs and compares them:

    pytest benchmarks --benchmark-only --benchmark-autosave -k swiglu
    pytest benchmarks --benchmark-only --benchmark-compare -k swiglu

The backends run one after another here; on a busy machine trust kernels.py, which alternates between them. The test
suite of this project does not collect this folder.
"""

from itertools import cycle
from typing import NamedTuple

import pytest
import torch

import kernels as bench
from unite_fast.kernels import backend
from unite_fast.kernels.fused_op import as_tuple

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = bench.parse_shape(bench.SHAPES[DEVICE.type])
CASES = list(bench.cases(bench.OPS, [SHAPE], DEVICE))
OURS = "triton" if DEVICE.type == "cuda" else "native"
ROUNDS, WARM_UP_ROUNDS = 30, 5


class Prepared(NamedTuple):
    case: bench.Case
    backends: dict
    copies: list


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.title.replace(" ", "-"))
def prepared(request) -> Prepared:
    """A case with its numbers, made once for all its backends and ways."""
    if missing := backend.why_missing(OURS):
        pytest.skip(missing)
    torch.compiler.reset()
    return Prepared(request.param, request.param.backends(), bench.copies(request.param))


@pytest.mark.parametrize("backend_name", ["eager", "compiled", OURS])
@pytest.mark.parametrize("way", bench.WAYS)
def test_op(prepared, backend_name, way, benchmark):
    case, rotated = prepared.case, cycle(prepared.copies)
    call, setting = prepared.backends[backend_name]

    def forward(copy):
        return as_tuple(call(**copy.arguments)), copy.leaves, copy.incoming

    def both(copy):
        return finish(torch.autograd.grad(*forward(copy)))

    def finish(results):
        """Wait for the device: a call returns before its kernels have run."""
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return results

    timed, setup = {
        "forward": (lambda copy: finish(forward(copy)), lambda: ((next(rotated),), {})),
        "backward": (lambda *args: finish(torch.autograd.grad(*args)), lambda: (finish(forward(next(rotated))), {})),
        "both": (both, lambda: ((next(rotated),), {})),
    }[way]
    benchmark.group = f"{case.title}, {way}"
    benchmark.extra_info["bytes"] = sum(case.bytes) if way == "both" else getattr(case.bytes, way)
    with backend.using(setting):
        benchmark.pedantic(timed, setup=setup, rounds=ROUNDS, warmup_rounds=WARM_UP_ROUNDS)
