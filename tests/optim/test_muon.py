"""Muon against its definition in float64 and against PyTorch's Muon."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.utils.flop_counter import FlopCounterMode

from unite_fast.distributed.dtensor import local
from unite_fast.model.layers import SwiGLU
from unite_fast.optim import muon as muon_module
from unite_fast.optim.muon import COEFFICIENTS, Muon, newton_schulz, newton_schulz_flops

SHAPES = [(16, 40), (40, 16), (24, 24), (96, 32), (5, 123), (1, 7)]

BAD = (float("nan"), float("inf"), -float("inf"))
SLACK = 2.0
"""Allowed multiple of the error of drawn arithmetic (tests/drawn_arithmetic.py) or of PyTorch's Muon."""


def normal(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def iteration(g: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """X <- aX + b(XX')X + c(XX')(XX')X five times from g / |g|, evaluated as written."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g * g).sum().sqrt().clamp_min(eps)
    for _ in range(5):
        x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
    return x


def updates_by_definition(gradients: list[torch.Tensor], lr: float) -> list[torch.Tensor]:
    """Muon's updates by definition, in the precision of the tensors."""
    updates, m = [], torch.zeros_like(gradients[0])
    for g in gradients:
        m = 0.95 * m + 0.05 * g
        updates.append(-lr * 0.2 * max(g.shape) ** 0.5 * iteration(0.05 * g + 0.95 * m))
    return updates


def trajectory(start: torch.Tensor, gradients: list[torch.Tensor], lr: float) -> torch.Tensor:
    return sum(updates_by_definition(gradients, lr), start)


def exact_trajectory(start: torch.Tensor, gradients: list[torch.Tensor], lr: float) -> torch.Tensor:
    return trajectory(start.double(), [g.double() for g in gradients], lr)


@pytest.fixture
def drawn_error(drawn_arithmetic) -> Callable[[Callable[[], torch.Tensor], torch.Tensor], float]:
    """The largest error of a computation over three draws of arithmetic."""

    def worst(compute: Callable[[], torch.Tensor], expected: torch.Tensor) -> float:
        errors = []
        for seed in range(3):
            with drawn_arithmetic(seed):
                result = compute()
            errors.append(error(result, expected))
        return max(errors)

    return worst


def run(optimizer, parameters: list[torch.Tensor], gradients: list[list[torch.Tensor]]) -> None:
    for step in gradients:
        for parameter, g in zip(parameters, step, strict=True):
            parameter.grad = g.clone()
        optimizer.step()


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.detach().double() - expected).norm() / expected.norm())


def muon(parameters, lr=0.1, dtype=torch.bfloat16) -> Muon:
    return Muon(parameters, lr, momentum=0.95, eps=1e-6, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz_in_float32_matches_float64(shape, drawn_error):
    g = normal(shape)
    actual, expected = newton_schulz(g[None], 1e-6)[0], iteration(g.double())
    assert error(actual, expected) <= SLACK * drawn_error(lambda: iteration(g), expected)


def test_newton_schulz_changes_only_the_singular_values():
    """U S V' becomes U f(S) V', and f brings all but the smallest close to 1."""
    g = normal((12, 30)).double()
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    actual = u.T @ newton_schulz(g[None], 1e-6)[0] @ vt.T
    values = actual.diagonal()
    torch.testing.assert_close(actual, torch.diag(values), atol=1e-10, rtol=0)
    f = s / s.norm()
    for _ in range(5):
        f = COEFFICIENTS[0] * f + COEFFICIENTS[1] * f**3 + COEFFICIENTS[2] * f**5
    torch.testing.assert_close(values, f, atol=0, rtol=1e-12)
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_matches_its_matrices_one_by_one(dtype, drawn_error, bfloat16_matmuls):
    g = normal((5, 24, 40))
    actual = newton_schulz(g.to(dtype), 1e-6)
    assert actual.dtype == dtype
    for matrix, result in zip(g, actual, strict=True):
        expected = iteration(matrix.double())
        single = partial(muon_module._newton_schulz, matrix[None].to(dtype), 1e-6)
        assert error(result, expected) <= SLACK * drawn_error(lambda single=single: single()[0], expected)


def test_a_zero_gradient_changes_nothing():
    parameter = torch.nn.Parameter(normal((4, 6)))
    before = parameter.detach().clone()
    run(muon([parameter]), [parameter], [[torch.zeros(4, 6)]])
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_several_steps_in_float32_match_float64(shape, drawn_error):
    start = normal(shape)
    gradients = [normal(shape, seed) for seed in range(1, 6)]
    parameter = torch.nn.Parameter(start.clone())
    run(muon([parameter], dtype=torch.float32), [parameter], [[g] for g in gradients])
    expected = exact_trajectory(start, gradients, lr=0.1)
    assert error(parameter, expected) <= SLACK * drawn_error(lambda: trajectory(start, gradients, lr=0.1), expected)


def test_several_steps_in_bfloat16_are_as_close_to_float64_as_pytorchs_muon(bfloat16_matmuls):
    """All shapes together, so that matrices of one shape are batched."""
    shapes = [*SHAPES, (16, 40), (24, 24), (16, 40)]
    starts = [0.01 * normal(shape, i) for i, shape in enumerate(shapes)]  # small, so that the updates dominate
    gradients = [[normal(shape, 100 * step + i) for i, shape in enumerate(shapes)] for step in range(1, 6)]
    ours = [torch.nn.Parameter(start.clone()) for start in starts]
    theirs = [torch.nn.Parameter(start.clone()) for start in starts]
    run(muon(ours), ours, gradients)
    run(
        torch.optim.Muon(
            theirs, lr=0.1, weight_decay=0.0, momentum=0.95, nesterov=True, eps=1e-6, adjust_lr_fn="match_rms_adamw"
        ),
        theirs,
        gradients,
    )
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        expected = exact_trajectory(starts[i], [step[i] for step in gradients], lr=0.1)
        assert error(b, expected) < 0.05  # else they are not the same algorithm
        assert error(a, expected) <= SLACK * error(b, expected), shapes[i]


def test_a_parameter_without_gradient_is_unchanged():
    used, unused = torch.nn.Parameter(normal((4, 6))), torch.nn.Parameter(normal((4, 6), 1))
    optimizer, before = muon([used, unused]), unused.detach().clone()
    used.grad = normal((4, 6), 2)
    optimizer.step()
    assert torch.equal(unused, before)
    assert not optimizer.state[unused]["momentum"].any()


def test_the_gradient_is_not_overwritten():
    parameter, g = torch.nn.Parameter(normal((4, 6))), normal((4, 6), 1)
    parameter.grad = g.clone()
    muon([parameter]).step()
    assert torch.equal(parameter.grad, g)


def test_the_rate_is_read_at_every_step():
    parameter = torch.nn.Parameter(normal((4, 6)))
    optimizer, before = muon([parameter]), parameter.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, [parameter], [[normal((4, 6), 1)]])
    assert torch.equal(parameter, before)
    assert optimizer.state[parameter]["momentum"].any()


def test_two_factors_converge():
    """A low-rank factorization, where the loss must fall most of the way to its minimum."""
    target = normal((20, 30)) / 5
    a, b = torch.nn.Parameter(0.1 * normal((20, 8), 1)), torch.nn.Parameter(0.1 * normal((8, 30), 2))
    optimizer = muon([a, b], lr=0.05)

    def loss():
        return (a @ b - target).square().mean()

    first = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    best = torch.linalg.svdvals(target)[8:].square().sum().item() / target.numel()
    assert loss().item() - best < 0.3 * (first - best)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flops_match_a_count_of_the_matmuls(shape):
    with FlopCounterMode(display=False) as counter:
        muon_module._newton_schulz(normal(shape)[None], 1e-6)
    assert newton_schulz_flops(shape) == counter.get_total_flops()


def test_swiglu_of_width_1024_is_scaled_by_its_true_hidden_width(monkeypatch):
    """On a GPU, matmuls use weights padded to 2752. The parameters, and so the scale of their update, keep 2730."""
    monkeypatch.setattr(muon_module, "newton_schulz", lambda batch, eps: torch.ones_like(batch))
    swiglu = SwiGLU(1024)
    assert swiglu.weights(padded=True)[2].shape == (1024, 2752)
    parameters = [swiglu.fc_in.weight, swiglu.fc_out.weight]
    assert [p.shape for p in parameters] == [(5460, 1024), (1024, 2730)]
    for p in parameters:
        p.data.zero_()
        p.grad = torch.zeros_like(p)
    muon(parameters, lr=1.0).step()
    for p, side in zip(parameters, (5460, 2730), strict=True):
        assert torch.equal(p, torch.full_like(p, -0.2 * side**0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_process_computes_the_formula_bit_for_bit(dtype):
    """Sharding support adds no rounding to plain tensors."""
    shapes = [(16, 40), (40, 16), (16, 40), (24, 24)]
    parameters = [torch.nn.Parameter(normal(shape, i)) for i, shape in enumerate(shapes)]
    expected, momenta = [p.detach().clone() for p in parameters], [torch.zeros(shape) for shape in shapes]
    optimizer = muon(parameters, dtype=dtype)
    for step in range(3):
        gradients = [normal(shape, 100 * step + i) for i, shape in enumerate(shapes)]
        run(optimizer, parameters, [gradients])
        momenta = [torch.lerp(m, g, 1 - 0.95) for m, g in zip(momenta, gradients, strict=True)]
        directions = [torch.lerp(g, m, 0.95).to(dtype) for m, g in zip(momenta, gradients, strict=True)]
        for same in ([0, 2], [1], [3]):
            for k, u in zip(same, newton_schulz(torch.stack([directions[k] for k in same]), 1e-6), strict=True):
                expected[k].add_(u, alpha=-0.1 * 0.2 * max(shapes[k]) ** 0.5)
    assert all(map(torch.equal, parameters, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_found_inf_skips_a_step(dtype):
    """With found_inf = 1 no bit changes, although gradients are NaN or infinite. found_inf = 0 has no effect."""
    starts = [normal(shape, i) for i, shape in enumerate(SHAPES)]
    ours, plain = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizer, other = muon(ours, dtype=dtype), muon(plain, dtype=dtype)
    optimizer.found_inf = torch.zeros(())
    gradients = [[normal(shape, 100 * step + i) for i, shape in enumerate(SHAPES)] for step in range(2)]
    run(optimizer, ours, gradients[:1])
    run(other, plain, gradients[:1])
    optimizer.found_inf.fill_(1)
    run(optimizer, ours, [[torch.full(shape, bad) for shape, bad in zip(SHAPES, 2 * BAD, strict=True)]])
    assert all(map(torch.equal, ours, plain))
    momenta = [[o.state[p]["momentum"] for p in o.param_groups[0]["params"]] for o in (optimizer, other)]
    assert all(map(torch.equal, *momenta))
    optimizer.found_inf.fill_(0)
    run(optimizer, ours, gradients[1:])
    run(other, plain, gradients[1:])
    assert all(map(torch.equal, ours, plain))


def test_momenta_exist_before_the_first_step():
    """A checkpoint is loaded into them in place."""
    parameter = torch.nn.Parameter(normal((4, 6)))
    momentum = muon([parameter]).state[parameter]["momentum"]
    assert momentum.shape == (4, 6) and not momentum.any() and not momentum.requires_grad


GRIDS = {"fsdp 2": (1, 2), "ddp 2": (2, 1), "fsdp 4": (1, 4), "ddp 4": (4, 1), "hsdp 2 x 2": (2, 2)}
ODD = [(16, 40), (40, 16), (16, 40), (13, 24), (24, 13), (3, 50), (1, 7), (16, 40), (126, 96), (16, 40), (20, 36)]
"""Rows not divisible by 2 or 4, fewer rows than processes, shapes that occur once and several times."""
SHARDED_BY_COLUMN = (20, 36)
B = [(768, n) for n in (32, 512, 768, 2048, 3072)] + [(n, 768) for n in (1002, 2304, 3072, 4096, 4608)]
"""Shapes of UNITE-B's matrices. Here each side is divided by 16; benchmarks/muon.py compares them at full size."""
ALL_SHAPES = [*ODD, *((rows // 16, columns // 16) for rows, columns in B)]
STEPS = 3


class Matrices(nn.Module):
    """Parameters whose gradients are the arguments of forward."""

    def __init__(self, starts: list[torch.Tensor]):
        super().__init__()
        self.matrices = nn.ParameterList(start.clone() for start in starts)

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        return sum((w * g).sum() for w, g in zip(self.matrices, gradients, strict=True))


def all_gradients(step: int) -> list[torch.Tensor]:
    return [normal(shape, 100 * step + i) for i, shape in enumerate(ALL_SHAPES)]


def shard_over(grid: tuple[int, int]) -> Matrices:
    """The matrices, sharded over a grid by `fully_shard`."""
    dist.init_process_group("gloo")
    model = Matrices([torch.zeros(shape) for shape in ALL_SHAPES])
    mesh = init_device_mesh("cpu", grid, mesh_dim_names=("replicate", "shard"))
    return fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(int(p.shape == SHARDED_BY_COLUMN)))


def record_events(events: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record in order which collectives start, with their dtype, and the shape of each Newton-Schulz batch."""

    def record(module, name: str, detail: Callable) -> None:
        function = getattr(module, name)

        def recording(*args, **kwargs):
            events.append((name, detail(args)))
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, recording)

    record(dist, "all_to_all_single", lambda args: args[1].dtype)
    record(dist, "all_gather", lambda args: args[1].dtype)
    record(muon_module, "newton_schulz", lambda args: args[0].shape)


def train_sharded(grid: tuple[int, int], dtype: torch.dtype) -> dict:
    """Train on one of several processes. Returns whole parameters after each step, events of the first step, whether a
    skipped step leaves all bits unchanged, and the numbers of local elements of parameters and momenta."""
    model, after, events = shard_over(grid), [], []
    optimizer = muon(model.parameters(), dtype=dtype)
    for step in range(STEPS):
        model(all_gradients(step)).backward()
        with pytest.MonkeyPatch.context() as monkeypatch:
            if step == 0:
                record_events(events, monkeypatch)
            optimizer.step()
        optimizer.zero_grad()
        after.append([p.full_tensor().detach().numpy().copy() for p in model.parameters()])

    parameters, momenta = list(model.parameters()), [optimizer.state[p]["momentum"] for p in model.parameters()]
    before = [[local(x).detach().clone() for x in tensors] for tensors in (parameters, momenta)]
    optimizer.found_inf = torch.ones(())
    model([bad * g for g, bad in zip(all_gradients(9), 7 * BAD, strict=True)]).backward()
    optimizer.step()
    same = [torch.equal(local(x), y) for x, y in zip([*parameters, *momenta], [*before[0], *before[1]], strict=True)]
    sizes = [sum(x.numel() for x in tensors) for tensors in before]
    return {"after": after, "events": events, "skips": all(same), "sizes": sizes}


def updates(after: list[list[np.ndarray]], k: int) -> list[torch.Tensor]:
    """The update of matrix k in each step, from zero."""
    values = [np.zeros(ALL_SHAPES[k]), *(step[k].astype(np.float64) for step in after)]
    return [torch.from_numpy(b - a) for a, b in pairwise(values)]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def reference(request) -> tuple[torch.dtype, list]:
    """torch.optim.Muon in one process. Its Newton-Schulz always casts to bfloat16; float32 is that without the cast."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.param == "float32":
            monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
        parameters, after = [torch.nn.Parameter(torch.zeros(shape)) for shape in ALL_SHAPES], []
        optimizer = torch.optim.Muon(
            parameters, lr=0.1, weight_decay=0.0, momentum=0.95, eps=1e-6, adjust_lr_fn="match_rms_adamw"
        )
        for step in range(STEPS):
            run(optimizer, parameters, [all_gradients(step)])
            after.append([p.detach().numpy().copy() for p in parameters])
    return getattr(torch, request.param), after


@pytest.mark.parametrize("name", GRIDS)
def test_sharded_updates_match_torch_muon(name, reference, ranks):
    grid, (dtype, expected) = GRIDS[name], reference
    results = ranks(grid[0] * grid[1], train_sharded, grid, dtype)
    after = results[0]["after"]
    for rank in results:
        assert all(map(np.array_equal, rank["after"][-1], after[-1]))
        assert rank["skips"]

    # The worst update is about as close to float64 as the worst of torch.optim.Muon.
    errors = {"ours": [], "torch": []}
    for k in range(len(ALL_SHAPES)):
        exact = updates_by_definition([all_gradients(step)[k].double() for step in range(STEPS)], lr=0.1)
        for name, steps in (("ours", after), ("torch", expected)):
            errors[name] += [error(a, b) for a, b in zip(updates(steps, k), exact, strict=True)]
    assert max(errors["torch"]) < {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]  # else it is another algorithm
    assert max(errors["ours"]) <= SLACK * max(errors["torch"])

    # Each matrix was orthogonalised once, by one process.
    work = [shape for rank in results for kind, shape in rank["events"] if kind == "newton_schulz"]
    assert sorted(shape for n, *shape in work for _ in range(n)) == sorted(map(list, ALL_SHAPES))
    # All communication has the dtype of Newton-Schulz; all gathers start before any Newton-Schulz does.
    for rank in results:
        kinds = [kind for kind, _ in rank["events"]]
        assert {detail for kind, detail in rank["events"] if kind != "newton_schulz"} == {dtype}
        assert ("all_gather" in kinds, "all_to_all_single" in kinds) == (grid[0] > 1, grid[1] > 1)
        buckets = kinds.count("all_to_all_single") // 2
        assert kinds[:buckets] == ["all_to_all_single"] * buckets

    # Momenta are sharded like the parameters, and the processes of a row together have each element once.
    whole = sum(np.prod(shape) for shape in ALL_SHAPES)
    assert all(rank["sizes"][0] == rank["sizes"][1] for rank in results)
    assert sum(rank["sizes"][1] for rank in results) == grid[0] * whole


def step_with_few_matrices(grid: tuple[int, int]) -> list[np.ndarray]:
    dist.init_process_group("gloo")
    model = Matrices([torch.zeros(5, 3), torch.zeros(2, 7)])
    fully_shard(model, mesh=init_device_mesh("cpu", grid, mesh_dim_names=("replicate", "shard")))
    model([normal((5, 3)), normal((2, 7))]).backward()
    model.matrices[1].grad = None
    muon(model.parameters(), dtype=torch.float32).step()
    return [p.full_tensor().detach().numpy().copy() for p in model.parameters()]


@pytest.mark.parametrize("grid", [(4, 1), (1, 4)], ids=["ddp", "fsdp"])
def test_processes_that_own_no_matrix_get_the_updates(grid, ranks, drawn_error):
    """Four processes, one matrix with a gradient and one without."""
    start, gradients = torch.zeros(5, 3), [normal((5, 3))]
    expected = exact_trajectory(start, gradients, lr=0.1)
    allowed = SLACK * drawn_error(lambda: trajectory(start, gradients, lr=0.1), expected)
    for moved, unmoved in ranks(4, step_with_few_matrices, grid):
        assert error(torch.from_numpy(moved), expected) <= allowed
        assert not unmoved.any()
