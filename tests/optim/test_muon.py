"""Muon against float64 arithmetic and against PyTorch's own."""

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
"""Of the error of drawn arithmetic (see tests/drawn_arithmetic.py), or of PyTorch's own."""


def normal(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def iteration(g: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """X <- aX + b(XX')X + c(XX')(XX')X five times from g / |g|, in the definition's own order."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g * g).sum().sqrt().clamp_min(eps)
    for _ in range(5):
        x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
    return x


def updates_by_definition(gradients: list[torch.Tensor], lr: float) -> list[torch.Tensor]:
    """Muon's updates by its definition, in the tensors' precision."""
    moves, m = [], torch.zeros_like(gradients[0])
    for g in gradients:
        m = 0.95 * m + 0.05 * g
        moves.append(-lr * 0.2 * max(g.shape) ** 0.5 * iteration(0.05 * g + 0.95 * m))
    return moves


def trajectory(start: torch.Tensor, gradients: list[torch.Tensor], lr: float) -> torch.Tensor:
    return sum(updates_by_definition(gradients, lr), start)


def exact_trajectory(start: torch.Tensor, gradients: list[torch.Tensor], lr: float) -> torch.Tensor:
    return trajectory(start.double(), [g.double() for g in gradients], lr)


@pytest.fixture
def drawn_error(drawn_arithmetic) -> Callable[[Callable[[], torch.Tensor], torch.Tensor], float]:
    """The largest error of a computation in three draws of arithmetic."""

    def worst(compute: Callable[[], torch.Tensor], want: torch.Tensor) -> float:
        errors = []
        for seed in range(3):
            with drawn_arithmetic(seed):
                found = compute()
            errors.append(error(found, want))
        return max(errors)

    return worst


def run(optimizer, parameters: list[torch.Tensor], gradients: list[list[torch.Tensor]]) -> None:
    for step in gradients:
        for parameter, g in zip(parameters, step, strict=True):
            parameter.grad = g.clone()
        optimizer.step()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach().double() - want).norm() / want.norm())


def muon(parameters, lr=0.1, dtype=torch.bfloat16) -> Muon:
    return Muon(parameters, lr, momentum=0.95, eps=1e-6, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz_in_float32(shape, drawn_error):
    g = normal(shape)
    got, want = newton_schulz(g[None], 1e-6)[0], iteration(g.double())
    assert error(got, want) <= SLACK * drawn_error(lambda: iteration(g), want)


def test_newton_schulz_moves_singular_values_alone():
    """U S V' becomes U f(S) V', and f brings all but the smallest close to 1."""
    g = normal((12, 30)).double()
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    got = u.T @ newton_schulz(g[None], 1e-6)[0] @ vt.T
    values = got.diagonal()
    torch.testing.assert_close(got, torch.diag(values), atol=1e-10, rtol=0)
    f = s / s.norm()
    for _ in range(5):
        f = COEFFICIENTS[0] * f + COEFFICIENTS[1] * f**3 + COEFFICIENTS[2] * f**5
    torch.testing.assert_close(values, f, atol=0, rtol=1e-12)
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_is_its_matrices_one_by_one(dtype, drawn_error, products):
    g = normal((5, 24, 40))
    got = newton_schulz(g.to(dtype), 1e-6)
    assert got.dtype == dtype
    for one, alone in zip(g, got, strict=True):
        want = iteration(one.double())
        itself = partial(muon_module._newton_schulz, one[None].to(dtype), 1e-6)
        assert error(alone, want) <= SLACK * drawn_error(lambda itself=itself: itself()[0], want)


def test_a_zero_gradient_moves_nothing():
    parameter = torch.nn.Parameter(normal((4, 6)))
    before = parameter.detach().clone()
    run(muon([parameter]), [parameter], [[torch.zeros(4, 6)]])
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_several_steps_in_float32(shape, drawn_error):
    start = normal(shape)
    gradients = [normal(shape, seed) for seed in range(1, 6)]
    parameter = torch.nn.Parameter(start.clone())
    run(muon([parameter], dtype=torch.float32), [parameter], [[g] for g in gradients])
    want = exact_trajectory(start, gradients, lr=0.1)
    assert error(parameter, want) <= SLACK * drawn_error(lambda: trajectory(start, gradients, lr=0.1), want)


def test_several_steps_in_bfloat16_are_as_close_to_float64_as_pytorchs_own(products):
    """All shapes together, so that matrices of one shape go through as a batch."""
    shapes = [*SHAPES, (16, 40), (24, 24), (16, 40)]
    starts = [0.01 * normal(shape, i) for i, shape in enumerate(shapes)]  # small: the updates are what is compared
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
        want = exact_trajectory(starts[i], [step[i] for step in gradients], lr=0.1)
        assert error(b, want) < 0.05  # else they are not the same algorithm
        assert error(a, want) <= SLACK * error(b, want), shapes[i]


def test_a_parameter_without_gradient_is_left_alone():
    used, unused = torch.nn.Parameter(normal((4, 6))), torch.nn.Parameter(normal((4, 6), 1))
    optimizer, before = muon([used, unused]), unused.detach().clone()
    used.grad = normal((4, 6), 2)
    optimizer.step()
    assert torch.equal(unused, before)
    assert not optimizer.state[unused]["momentum"].any()


def test_the_gradient_is_not_written_over():
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


def test_one_shape_after_another_converges():
    """A least-squares problem that needs both factors: the loss must fall by far."""
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
def test_flops_are_those_of_the_products(shape):
    with FlopCounterMode(display=False) as counter:
        muon_module._newton_schulz(normal(shape)[None], 1e-6)
    assert newton_schulz_flops(shape) == counter.get_total_flops()


def test_swiglu_of_width_1024_is_scaled_by_its_true_hidden_width(monkeypatch):
    """A GPU multiplies by weights padded to 2752. The parameters, and so the update's scale, know of 2730 alone."""
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
def test_one_process_does_nothing_but_the_formula(dtype):
    """Bit for bit: what lets processes share the work costs plain tensors no rounding."""
    shapes = [(16, 40), (40, 16), (16, 40), (24, 24)]
    parameters = [torch.nn.Parameter(normal(shape, i)) for i, shape in enumerate(shapes)]
    want, momenta = [p.detach().clone() for p in parameters], [torch.zeros(shape) for shape in shapes]
    optimizer = muon(parameters, dtype=dtype)
    for step in range(3):
        gradients = [normal(shape, 100 * step + i) for i, shape in enumerate(shapes)]
        run(optimizer, parameters, [gradients])
        momenta = [torch.lerp(m, g, 1 - 0.95) for m, g in zip(momenta, gradients, strict=True)]
        directions = [torch.lerp(g, m, 0.95).to(dtype) for m, g in zip(momenta, gradients, strict=True)]
        for same in ([0, 2], [1], [3]):
            for k, u in zip(same, newton_schulz(torch.stack([directions[k] for k in same]), 1e-6), strict=True):
                want[k].add_(u, alpha=-0.1 * 0.2 * max(shapes[k]) ** 0.5)
    assert all(map(torch.equal, parameters, want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_skipped_on_the_device(dtype):
    """found_inf = 1: not a bit changes, although gradients are NaN and infinite. 0: as if it were not there."""
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


def test_momenta_are_there_before_the_first_step():
    """So that a checkpoint loads into them in place."""
    parameter = torch.nn.Parameter(normal((4, 6)))
    momentum = muon([parameter]).state[parameter]["momentum"]
    assert momentum.shape == (4, 6) and not momentum.any() and not momentum.requires_grad


GRIDS = {"fsdp 2": (1, 2), "ddp 2": (2, 1), "fsdp 4": (1, 4), "ddp 4": (4, 1), "hsdp 2 x 2": (2, 2)}
ODD = [(16, 40), (40, 16), (16, 40), (13, 24), (24, 13), (3, 50), (1, 7), (16, 40), (126, 96), (16, 40), (20, 36)]
"""Rows that 2 and 4 do not divide, fewer rows than processes, shapes once and often."""
CUT_IN_COLUMNS = (20, 36)
B = [(768, n) for n in (32, 512, 768, 2048, 3072)] + [(n, 768) for n in (1002, 2304, 3072, 4096, 4608)]
"""The shapes of UNITE-B's matrices. Here each side is divided by 16; benchmarks/muon.py compares them at full size."""
SPREAD = [*ODD, *((rows // 16, columns // 16) for rows, columns in B)]
STEPS = 3


class Matrices(nn.Module):
    """Parameters whose gradients are what forward is given."""

    def __init__(self, starts: list[torch.Tensor]):
        super().__init__()
        self.matrices = nn.ParameterList(start.clone() for start in starts)

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        return sum((w * g).sum() for w, g in zip(self.matrices, gradients, strict=True))


def spread_gradients(step: int) -> list[torch.Tensor]:
    return [normal(shape, 100 * step + i) for i, shape in enumerate(SPREAD)]


def spread_over(grid: tuple[int, int]) -> Matrices:
    """As `fully_shard` spreads them; what is local to a process stays so."""
    dist.init_process_group("gloo")
    model = Matrices([torch.zeros(shape) for shape in SPREAD])
    mesh = init_device_mesh("cpu", grid, mesh_dim_names=("replicate", "shard"))
    return fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(int(p.shape == CUT_IN_COLUMNS)))


def watch(events: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Note, in their order, what collectives start, with what precision, and the shapes of batches worked on."""

    def noting(module, name: str, what) -> None:
        function = getattr(module, name)

        def noted(*args, **kwargs):
            events.append((name, what(args)))
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, noted)

    noting(dist, "all_to_all_single", lambda args: args[1].dtype)
    noting(dist, "all_gather", lambda args: args[1].dtype)
    noting(muon_module, "newton_schulz", lambda args: args[0].shape)


def train_spread(grid: tuple[int, int], dtype: torch.dtype) -> dict:
    """What one process sees of training: whole parameters after each step, what was started in the first, whether a
    skipped step changes a bit, elements of parameters and of momenta that it holds."""
    model, after, events = spread_over(grid), [], []
    optimizer = muon(model.parameters(), dtype=dtype)
    for step in range(STEPS):
        model(spread_gradients(step)).backward()
        with pytest.MonkeyPatch.context() as monkeypatch:
            if step == 0:
                watch(events, monkeypatch)
            optimizer.step()
        optimizer.zero_grad()
        after.append([p.full_tensor().detach().numpy().copy() for p in model.parameters()])

    parameters, momenta = list(model.parameters()), [optimizer.state[p]["momentum"] for p in model.parameters()]
    held = [[local(x).detach().clone() for x in tensors] for tensors in (parameters, momenta)]
    optimizer.found_inf = torch.ones(())
    model([bad * g for g, bad in zip(spread_gradients(9), 7 * BAD, strict=True)]).backward()
    optimizer.step()
    same = [torch.equal(local(x), y) for x, y in zip([*parameters, *momenta], [*held[0], *held[1]], strict=True)]
    sizes = [sum(x.numel() for x in tensors) for tensors in held]
    return {"after": after, "events": events, "skips": all(same), "sizes": sizes}


def updates(after: list[list[np.ndarray]], k: int) -> list[torch.Tensor]:
    """How matrix k moved in each step, from zero."""
    places = [np.zeros(SPREAD[k]), *(step[k].astype(np.float64) for step in after)]
    return [torch.from_numpy(b - a) for a, b in pairwise(places)]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def reference(request) -> tuple[torch.dtype, list]:
    """torch.optim.Muon in one process. Its Newton-Schulz always casts to bfloat16; float32 is that without the cast."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.param == "float32":
            monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
        parameters, after = [torch.nn.Parameter(torch.zeros(shape)) for shape in SPREAD], []
        optimizer = torch.optim.Muon(
            parameters, lr=0.1, weight_decay=0.0, momentum=0.95, eps=1e-6, adjust_lr_fn="match_rms_adamw"
        )
        for step in range(STEPS):
            run(optimizer, parameters, [spread_gradients(step)])
            after.append([p.detach().numpy().copy() for p in parameters])
    return getattr(torch, request.param), after


@pytest.mark.parametrize("name", GRIDS)
def test_spread_over_processes(name, reference, ranks):
    grid, (dtype, want) = GRIDS[name], reference
    seen = ranks(grid[0] * grid[1], train_spread, grid, dtype)
    after = seen[0]["after"]
    for rank in seen:
        assert all(map(np.array_equal, rank["after"][-1], after[-1]))
        assert rank["skips"]

    # The worst update is as close to float64 as the worst of torch.optim.Muon.
    errors = {"ours": [], "torch": []}
    for k in range(len(SPREAD)):
        exact = updates_by_definition([spread_gradients(step)[k].double() for step in range(STEPS)], lr=0.1)
        for name, places in (("ours", after), ("torch", want)):
            errors[name] += [error(a, b) for a, b in zip(updates(places, k), exact, strict=True)]
    assert max(errors["torch"]) < {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]  # else it is another algorithm
    assert max(errors["ours"]) <= SLACK * max(errors["torch"])

    # Each matrix was worked on once, by one process.
    work = [shape for rank in seen for kind, shape in rank["events"] if kind == "newton_schulz"]
    assert sorted(shape for n, *shape in work for _ in range(n)) == sorted(map(list, SPREAD))
    # All that travels does so in the precision of the work; all gathers start before any work does.
    for rank in seen:
        kinds = [kind for kind, _ in rank["events"]]
        assert {what for kind, what in rank["events"] if kind != "newton_schulz"} == {dtype}
        assert ("all_gather" in kinds, "all_to_all_single" in kinds) == (grid[0] > 1, grid[1] > 1)
        buckets = kinds.count("all_to_all_single") // 2
        assert kinds[:buckets] == ["all_to_all_single"] * buckets

    # Momenta are cut as the parameters are, and all processes of a row together hold each element once.
    whole = sum(np.prod(shape) for shape in SPREAD)
    assert all(rank["sizes"][0] == rank["sizes"][1] for rank in seen)
    assert sum(rank["sizes"][1] for rank in seen) == grid[0] * whole


def more_processes_than_matrices(grid: tuple[int, int]) -> list[np.ndarray]:
    dist.init_process_group("gloo")
    model = Matrices([torch.zeros(5, 3), torch.zeros(2, 7)])
    fully_shard(model, mesh=init_device_mesh("cpu", grid, mesh_dim_names=("replicate", "shard")))
    model([normal((5, 3)), normal((2, 7))]).backward()
    model.matrices[1].grad = None
    muon(model.parameters(), dtype=torch.float32).step()
    return [p.full_tensor().detach().numpy().copy() for p in model.parameters()]


@pytest.mark.parametrize("grid", [(4, 1), (1, 4)], ids=["ddp", "fsdp"])
def test_processes_that_own_nothing_follow(grid, ranks, drawn_error):
    """One matrix with a gradient, one without, four processes."""
    start, gradients = torch.zeros(5, 3), [normal((5, 3))]
    want = exact_trajectory(start, gradients, lr=0.1)
    allowed = SLACK * drawn_error(lambda: trajectory(start, gradients, lr=0.1), want)
    for moved, unmoved in ranks(4, more_processes_than_matrices, grid):
        assert error(torch.from_numpy(moved), want) <= allowed
        assert not unmoved.any()
