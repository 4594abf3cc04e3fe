"""The step in a few launches, in Triton's interpreter, against float64 and the foreach step."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from unite_fast.config import Config
from unite_fast.distributed.dtensor import full_tensor
from unite_fast.kernels import backend
from unite_fast.kernels.fused_op import triton_function
from unite_fast.model.unite import UNITE
from unite_fast.optim.ema import EMA
from unite_fast.optim.fused_step import FusedStep
from unite_fast.optim.muon import COEFFICIENTS, Muon
from unite_fast.training.train_state import TrainState

pytestmark = pytest.mark.skipif(bool(backend.why_missing("triton")), reason=backend.why_missing("triton") or "here")

SLACK = 2.0
"""Allowed multiple of the error of drawn arithmetic (tests/drawn_arithmetic.py), or of the foreach step."""
EVEN = [(24, 1024), (8, 16), (1, 16384), (8, 8)]
ODD = [(5, 123), (1, 7), (2, 9001), (1, 1), (3, 0), (16, 40)]
"""Sizes that are no multiple of 8, one without elements, one of several chunks."""
NORM, CLIP, MOMENTUM, DECAY, BETAS, EPS, LR = 4.0, 1.0, 0.95, 0.99, (0.9, 0.999), 1e-6, 1e-3
FACTOR = CLIP / (NORM + 1e-6)

gradient_norm, muon_momentum, muon_update, adamw_update = (
    triton_function("optimizer", name) for name in ("gradient_norm", "muon_momentum", "muon_update", "adamw_update")
)


def normal(shapes, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def error(actual, expected) -> float:
    """Over all elements of lists of tensors."""
    actual, expected = (torch.cat([x.detach().double().flatten() for x in xs]) for xs in (actual, expected))
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "tensors, aligned",
    [
        ([torch.zeros(16), torch.zeros(8)], True),
        ([torch.zeros(16), torch.zeros(7)], False),
        ([torch.zeros(16), torch.zeros(17)[1:]], False),
    ],
    ids=["aligned", "odd size", "odd address"],
)
def test_wide_accesses_need_aligned_tensors(tensors, aligned):
    from unite_fast.kernels.triton_kernels.optimizer import table_of

    assert table_of(tensors)[2]["ALIGNED"] == aligned


@pytest.fixture
def check(drawn_arithmetic):
    """check(actual, formula, *inputs): the formula gives a list of lists of tensors, judged in float64."""

    def compare(actual: list, formula, *inputs: list[Tensor]) -> None:
        exact = list(zip(*(formula(*(x.double() for x in each)) for each in zip(*inputs, strict=True)), strict=True))
        for i, result in enumerate(actual):
            drawn = []
            for seed in range(3):
                with drawn_arithmetic(seed):
                    results = [formula(*(x.float() for x in each))[i] for each in zip(*inputs, strict=True)]
                drawn.append(error(results, exact[i]))
            rounded = result[0].dtype == torch.bfloat16
            assert error(result, exact[i]) <= SLACK * (2**-9 if rounded else max(drawn)), i

    return compare


@pytest.fixture(params=[EVEN, ODD], ids=["even", "odd"])
def shapes(request) -> list[tuple[int, int]]:
    return request.param


def lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    return start + weight * (end - start)


def test_norm(shapes, drawn_arithmetic):
    gradients = normal(shapes, 0)
    whole = torch.cat([g.flatten() for g in gradients])
    expected, drawn = whole.double().norm(), []
    for seed in range(3):
        with drawn_arithmetic(seed):
            drawn.append(error([(whole * whole).sum().sqrt()], [expected]))
    (norm,) = gradient_norm(gradients)
    assert norm.shape == () and norm.dtype == torch.float32
    assert error([norm], [expected]) <= SLACK * max(drawn)


def test_norm_of_bad_gradients_is_bad():
    gradients = normal(ODD, 0)
    gradients[2][1, 9000] = math.inf
    assert gradient_norm(gradients)[0].isinf()
    gradients[2][1, 9000] = math.nan
    assert gradient_norm(gradients)[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momentum(dtype, shapes, check):
    gradients, momenta = normal(shapes, 0), normal(shapes, 1)
    before = [m.clone() for m in momenta]
    # Not every direction is wanted on every rank.
    directions = [None if k == 1 else torch.full(shape, math.nan, dtype=dtype) for k, shape in enumerate(shapes)]

    def formula(g, m):
        g = g * FACTOR
        m = lerp(m, g, 1 - MOMENTUM)
        return m, lerp(g, m, MOMENTUM)

    muon_momentum(gradients, momenta, directions, torch.tensor(NORM), CLIP, MOMENTUM, None)
    check([momenta], formula, gradients, before)
    wanted = [k for k in range(len(shapes)) if k != 1]
    inputs = ([x[k] for k in wanted] for x in (gradients, before))
    check([[momenta[k] for k in wanted], [directions[k] for k in wanted]], formula, *inputs)
    assert all(map(torch.equal, gradients, normal(shapes, 0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_update(dtype, shapes, check):
    weights, averages, updates = normal(shapes, 0), normal(shapes, 1), normal(shapes, 2, dtype)
    rates = [0.01 * (k + 1) for k in range(len(shapes))]
    before = [[x.clone() for x in xs] for xs in (weights, averages)]
    factors = [torch.full((), rate) for rate in rates]

    def formula(w, average, update, rate):
        w = w - rate * update
        return w, lerp(average, w, 1 - DECAY)

    muon_update(weights, averages, updates, rates, DECAY, None)
    check([weights, averages], formula, *before, updates, factors)


def adamw_formula(step: int):
    def formula(g, w, average, m, v):
        g = g * FACTOR
        m, v = lerp(m, g, 1 - BETAS[0]), lerp(v, g * g, 1 - BETAS[1])
        w = w - LR / (1 - BETAS[0] ** step) * m / (v.sqrt() / math.sqrt(1 - BETAS[1] ** step) + EPS)
        return w, lerp(average, w, 1 - DECAY), m, v

    return formula


@pytest.mark.parametrize("step", [1, 1000])
def test_adamw_update(step, shapes, check):
    gradients, weights, averages, m, v = (normal(shapes, seed) for seed in range(5))
    v = [x.square() for x in v]
    before = [[x.clone() for x in xs] for xs in (gradients, weights, averages, m, v)]
    steps = [torch.tensor(step - 1.0) for _ in shapes]
    adamw_update(gradients, weights, averages, (m, v), steps, torch.tensor(NORM), CLIP, LR, BETAS, EPS, DECAY, None)
    check([weights, averages, m, v], adamw_formula(step), *before)
    assert all(each == step for each in steps)
    # The update itself, which is small beside the weights.
    exact = [
        adamw_formula(step)(*(x.double() for x in each))[0] - each[1].double() for each in zip(*before, strict=True)
    ]
    zeros = [torch.zeros(shape) for shape in shapes]
    m, v = ([x.clone() for x in xs] for xs in before[3:])
    steps = [torch.tensor(step - 1.0) for _ in shapes]
    adamw_update(before[0], zeros, averages, (m, v), steps, torch.tensor(NORM), CLIP, LR, BETAS, EPS, DECAY, None)
    assert error(zeros, exact) < 1e-6


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf(found):
    """1: no bit changes, although the gradients are NaN. 0: as without it."""
    shapes, found_inf, norm = ODD, torch.tensor(found), torch.tensor(math.nan if found else NORM)

    def step(found_inf: Tensor | None) -> list[Tensor]:
        gradients, weights, averages, m, v = (normal(shapes, seed) for seed in range(5))
        v = [x.square() for x in v]
        steps, updates = [torch.tensor(3.0) for _ in shapes], normal(shapes, 6)
        if found:
            updates, gradients = ([torch.full_like(x, math.nan) for x in xs] for xs in (updates, gradients))
        before = [x.clone() for x in (*weights, *averages, *m, *v, *steps)]
        muon_momentum(gradients, m, [None] * len(shapes), norm, CLIP, MOMENTUM, found_inf)
        muon_update(weights, averages, updates, [LR] * len(shapes), DECAY, found_inf)
        adamw_update(gradients, weights, averages, (m, v), steps, norm, CLIP, LR, BETAS, EPS, DECAY, found_inf)
        return before if found_inf is None and found else [*weights, *averages, *m, *v, *steps]

    assert all(map(torch.equal, step(found_inf), step(None)))


def iteration(g: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    x = g / (g * g).sum().sqrt()
    for _ in range(5):
        x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
    return x


def exact_steps(state: TrainState, gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a fresh state after these steps, in float64, by definition."""
    optim, tensors = state.config.optim, {name: x.detach().double().clone() for name, x in state.tensors().items()}
    for number, named in enumerate(gradients, 1):
        norm = torch.cat([g.double().flatten() for g in named.values()]).norm()
        for name, g in named.items():
            g = g.double() * min(optim.clip_norm / (norm + 1e-6), 1)
            w, average = tensors[f"model.{name}"], tensors[f"ema.{name}"]
            if name in state.muon_parameters:
                m = tensors[f"optim.{name}.momentum"]
                m.copy_(lerp(m, g, 1 - optim.muon_momentum))
                w -= rate(state, number) * 0.2 * max(g.shape) ** 0.5 * iteration(lerp(g, m, optim.muon_momentum))
            else:
                m, v = tensors[f"optim.{name}.exp_avg"], tensors[f"optim.{name}.exp_avg_sq"]
                beta, beta_2 = optim.adamw_betas
                m.copy_(lerp(m, g, 1 - beta))
                v.copy_(lerp(v, g * g, 1 - beta_2))
                tensors[f"optim.{name}.step"] += 1
                w -= rate(state, number) * m / (1 - beta**number) / ((v / (1 - beta_2**number)).sqrt() + optim.eps)
            average.copy_(lerp(average, w, 1 - optim.ema_decay))
    return tensors


def rate(state: TrainState, number: int) -> float:
    """The rate of the number-th step, from a state that is at step 1: the rate of step 0 is zero."""
    return TrainState.learning_rate.fget(type("At", (), {"config": state.config, "step": number}))


def take_steps(config: Config, gradients: list[dict[str, Tensor]]) -> TrainState:
    state = TrainState(UNITE.create(config.model, seed=0), config)
    state.step = 1
    for named in gradients:
        for name, parameter in state.model.named_parameters():
            parameter.grad = named[name].clone() if name in named else None
        state.apply_gradients()
    return state


@pytest.fixture
def small_config(tiny_config) -> Config:
    tiny_config.model.encoder.depth = tiny_config.model.decoder.depth = 1
    tiny_config.model.encoder.in_context_start = 0
    return tiny_config


@pytest.fixture
def gradients(small_config) -> list[dict[str, Tensor]]:
    model = UNITE.create(small_config.model, seed=0)
    named = [(name, p.shape) for name, p in model.named_parameters() if p.requires_grad]
    names, shapes = zip(*named, strict=True)
    return [dict(zip(names, normal(shapes, seed), strict=True)) for seed in range(3)]


@pytest.mark.parametrize("muon_dtype", ["float32", "bfloat16"])
def test_steps_are_as_close_to_float64_as_the_foreach_steps(muon_dtype, small_config, gradients):
    small_config.optim.muon_dtype = muon_dtype
    fresh = TrainState(UNITE.create(small_config.model, seed=0), small_config)
    start, exact = fresh.tensors(), exact_steps(fresh, gradients)
    with backend.using("triton"):
        assert fresh.fused_step.available
        ours = take_steps(small_config, gradients).tensors()
    with backend.using("reference"):
        theirs = take_steps(small_config, gradients).tensors()
    for kind in ("model.", "ema.", ".momentum", ".exp_avg", ".exp_avg_sq", ".step"):
        names = [name for name in start if (name.startswith(kind) or name.endswith(kind)) and exact[name].any()]
        errors = [error([each[name] for name in names], [exact[name] for name in names]) for each in (ours, theirs)]
        assert errors[1] < {"float32": 1e-6, "bfloat16": 1e-3}[muon_dtype], kind  # else it is another algorithm
        assert errors[0] <= SLACK * errors[1], kind


def test_a_skipped_step_changes_nothing(small_config, gradients):
    small_config.optim.nonfinite = "skip"
    bad = {name: torch.full_like(g, math.nan) for name, g in gradients[0].items()}
    with backend.using("triton"):
        plain, skipped = take_steps(small_config, gradients[:1]), take_steps(small_config, [gradients[0], bad])
    expected, actual = plain.tensors(), skipped.tensors()
    assert [name for name, x in actual.items() if not torch.equal(x, expected[name])] == []
    assert (int(plain.skipped_steps), int(skipped.skipped_steps)) == (0, 1)


def test_a_parameter_without_gradient_keeps_its_weight_and_its_average_moves(small_config, gradients):
    """As in the foreach step."""
    names = "decoder.cls_token", "decoder.pred.weight"
    first = {name: g for name, g in gradients[0].items() if name not in names}
    states = []
    for name in ("triton", "reference"):
        with backend.using(name):
            states.append(take_steps(small_config, [gradients[0], first]).tensors())
    ours, theirs = states
    for name in names:
        assert error([ours[f"ema.{name}"]], [theirs[f"ema.{name}"].double()]) < 1e-6
        assert error([ours[f"model.{name}"]], [theirs[f"model.{name}"].double()]) < 1e-6


class Layer(nn.Module):
    """Two matrices for Muon, one vector for AdamW. Rows are no multiple of 2."""

    def __init__(self):
        super().__init__()
        first, second, self_vector = normal([(6, 40), (13, 24), (17,)], 9)
        self.first, self.second, self.vector = nn.Parameter(first), nn.Parameter(second), nn.Parameter(self_vector)

    def forward(self, gradients: list[Tensor]) -> Tensor:
        return sum((p * g).sum() for p, g in zip(self.parameters(), gradients, strict=True))


def layer_step(model: nn.Module, adamw_class=torch.optim.AdamW, **settings) -> tuple[FusedStep, EMA]:
    ema = EMA(model, DECAY)
    muon = Muon([model.first, model.second], 0.1, MOMENTUM, EPS, torch.float32)
    adamw = adamw_class([model.vector], lr=0.01, **settings)
    if adamw_class is torch.optim.AdamW:
        zeros = {key: torch.zeros_like(model.vector) for key in ("exp_avg", "exp_avg_sq")}
        adamw.state[model.vector] = zeros | {"step": torch.zeros(())}
    return FusedStep(muon, adamw, ema, CLIP), ema


def train_layer(grid: tuple[int, int] | None) -> list[np.ndarray]:
    """Weights and averages after three steps, whole, of one process or of one of several."""
    model = Layer()
    if grid:
        dist.init_process_group("gloo")
        fully_shard(model, mesh=init_device_mesh("cpu", grid, mesh_dim_names=("replicate", "shard")))
    with backend.using("triton"):
        step, ema = layer_step(model)
        for seed in range(3):
            model(normal([(6, 40), (13, 24), (17,)], seed)).backward()
            step(torch.tensor(NORM), None)
            model.zero_grad()
    tensors = [*model.parameters(), *ema.averages.values()]
    return [full_tensor(x).detach().numpy().copy() for x in tensors]


@pytest.mark.parametrize("grid", [(1, 2), (2, 1)], ids=["fsdp", "ddp"])
def test_shards_step_as_one_process(grid, ranks):
    expected = [torch.from_numpy(x) for x in train_layer(None)]
    for results in ranks(2, train_layer, grid):
        for actual, one in zip(results, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(actual), one, rtol=1e-5, atol=1e-6)


def test_another_adamw_gets_clipped_gradients_and_its_averages_move():
    """As apex's, which is built from source."""
    model = Layer()
    before = model.vector.detach().clone()
    gradients = normal([(6, 40), (13, 24), (17,)], 0)
    model(gradients).backward()
    with backend.using("triton"):
        step, ema = layer_step(model, torch.optim.SGD)
        step(torch.tensor(NORM), None)
    expected = before.double() - 0.01 * FACTOR * gradients[2].double()
    assert error([model.vector], [expected]) < 1e-6
    assert error([ema.averages["vector"]], [lerp(before.double(), expected, 1 - DECAY)]) < 1e-6


def test_it_is_for_contiguous_float32_parameters_on_a_gpu():
    step, _ = layer_step(Layer())
    with backend.using("reference"):
        assert not step.available
    with backend.using("triton"):
        assert step.available
        assert not layer_step(Layer().double())[0].available
        strided = Layer()
        strided.first = nn.Parameter(strided.first.detach().T)
        assert not layer_step(strided)[0].available
