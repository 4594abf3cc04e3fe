"""Who owns which matrix and what travels, without processes; test_muon.py exchanges over real ones."""

from collections import Counter, defaultdict

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from unite_fast.model.unite import UNITE
from unite_fast.optim.muon import newton_schulz_flops
from unite_fast.optim.param_groups import split_parameters
from unite_fast.optim.sharded_matrices import SLACK, Exchange, Grid, Matrix, batches_by_owner, choose_owners, layout
from unite_fast.recipes import load_config

GRIDS = [(1, 1), (1, 3), (3, 1), (2, 3), (1, 8)]
SHAPES = [torch.Size(shape) for shape in ((7, 4), (4, 7), (7, 4), (2, 5), (7, 4), (1, 3), (4, 7))]


@pytest.fixture(scope="module")
def b_shapes() -> list[torch.Size]:
    with torch.device("meta"):
        model = UNITE(load_config("imagenet256_b").model)
    return [p.shape for p in split_parameters(model)[0].values()]


def loads(costs: list[int], owners: list[int], processes: int) -> list[int]:
    return [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == p) for p in range(processes)]


def batches(shapes: list[torch.Size], owners: list[int]) -> int:
    return len(set(zip(shapes, owners, strict=True)))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 9, 1002])
def test_shards_are_those_of_torch_chunk(rows, dim):
    whole = torch.arange(rows * 5).view(rows, 5)
    whole = whole if dim == 0 else whole.T
    for shards in (1, 2, 3, 4, 8):
        want = list(whole.chunk(shards, dim))
        want += [whole.narrow(dim, 0, 0)] * (shards - len(want))
        for shard, part in enumerate(want):
            matrix = Matrix(whole.shape, dim)
            assert matrix.shard_shape(shards, shard) == part.shape
            assert torch.equal(whole.narrow(dim, *matrix.extent(shards, shard)), part)


@pytest.mark.parametrize("processes", [1, 2, 8, 64])
def test_owners_of_b_have_equally_much_to_do_and_shapes_together(processes, b_shapes):
    costs = [newton_schulz_flops(shape) for shape in b_shapes]
    owners = choose_owners(b_shapes, costs, processes)
    assert owners == choose_owners(b_shapes, costs, processes)
    # No choice does better than the mean; and of the n + 1 dearest, two share one of n processes.
    dearest = sorted(costs, reverse=True)
    bound = max(sum(costs) / processes, sum(dearest[processes - 1 : processes + 1]))
    # Measured: 1.00, 1.01, 1.02 and 1.095 of it.
    assert max(loads(costs, owners, processes)) <= (1.1 if processes == 64 else 1.02) * bound
    # Measured: 19 on 8 processes; 60 where only the load counts.
    assert processes != 8 or batches(b_shapes, owners) <= 25


def test_what_batches_may_cost_in_balance_is_bounded():
    """Where no owner could keep matrices together within SLACK, balance goes first: 3 + 3 against 2 + 2 + 2."""
    shapes = [torch.Size(shape) for shape in ((3, 3), (3, 3), (2, 2), (2, 2), (2, 2))]
    owners = choose_owners(shapes, [30, 30, 20, 20, 20], 2)
    assert max(loads([30, 30, 20, 20, 20], owners, 2)) <= SLACK * 70
    assert choose_owners(shapes[:2], [30, 30], 2) == [0, 1]


def test_each_matrix_is_in_one_batch_of_its_owner_with_others_of_its_shape():
    owners = [0, 1, 0, 2, 1, 0, 1]
    buckets = batches_by_owner(SHAPES, owners, 4)
    seen = [(process, batch) for bucket in buckets for process, batch in enumerate(bucket) if batch]
    assert sorted(k for _, batch in seen for k in batch) == list(range(len(SHAPES)))
    for process, batch in seen:
        assert {owners[k] for k in batch} == {process}
        assert len({SHAPES[k] for k in batch}) == 1
    assert len(seen) == batches(SHAPES, owners)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_process_applies_the_function_to_batches_of_one_shape(dtype):
    matrices = [torch.full(shape, float(k)) for k, shape in enumerate(SHAPES)]
    exchange = Exchange([Matrix(shape) for shape in SHAPES], [1] * len(SHAPES), Grid())
    called = []

    def function(batch):
        called.append(tuple(batch.shape))
        assert batch.dtype == dtype
        return 2 * batch + 1

    results = exchange.apply(function, dict(enumerate(matrices)), dtype, torch.device("cpu"))
    assert sorted(called) == sorted((n, *shape) for shape, n in Counter(SHAPES).items())
    for result, matrix in zip(results, matrices, strict=True):
        assert torch.equal(result, (2 * matrix + 1).to(dtype))
    assert exchange.elements_sent() == 0


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_is_sent_is_what_others_own(grid):
    """Counted matrix by matrix: an owner's row sends it all but its own shard and gets as much back; rows pass on."""
    copies, shards = grid
    matrices = [Matrix(shape) for shape in SHAPES]
    places = [Grid(*grid, copy, shard) for copy in range(copies) for shard in range(shards)]
    exchanges = [Exchange(matrices, [shape.numel() for shape in SHAPES], place) for place in places]
    owners, sent, of_row = exchanges[0].owners, defaultdict(int), defaultdict(int)
    for k, matrix in enumerate(matrices):
        copy, owner = divmod(owners[k], shards)
        for shard in range(shards):
            numel = matrix.shard_shape(shards, shard).numel()
            of_row[copy, shard] += numel
            if shard != owner:
                sent[copy, shard] += numel
                sent[copy, owner] += numel
    for place, exchange in zip(places, exchanges, strict=True):
        assert exchange.owners == owners
        row_by_row = [of_row[copy, place.shard] for copy in range(copies)]
        assert exchange.elements_sent() == sent[place.copy, place.shard] + (copies - 1) * max(row_by_row)
        assert sorted(exchange.supplied) == [k for k, owner in enumerate(owners) if owner // shards == place.copy]


class Arrived:
    def wait(self) -> None:
        pass


def share_at_once() -> tuple[list[list], int, int]:
    """Results of one of three replicas, how much it was to send, and how much it sent. All-gathers that have happened
    when they are asked for send whatever is there by then: too early, and others get what nobody has worked on."""
    dist.init_process_group("gloo")
    sent, all_gather = [], dist.all_gather

    def gather(targets: list[Tensor], source: Tensor, group: dist.ProcessGroup, async_op: bool) -> Arrived:
        sent.append(source.numel())
        all_gather(targets, source, group)
        return Arrived()

    dist.all_gather = gather
    grid = Grid(dist.get_world_size(), 1, dist.get_rank(), 0, column=dist.group.WORLD)
    exchange = Exchange([Matrix(shape) for shape in SHAPES], [shape.numel() for shape in SHAPES], grid)
    matrices = {k: torch.full(shape, float(k)) for k, shape in enumerate(SHAPES)}
    results = exchange.apply(lambda batch: 2 * batch + 1, matrices, torch.float32, torch.device("cpu"))
    return [result.tolist() for result in results], exchange.elements_sent(), (grid.copies - 1) * sum(sent)


def test_replicas_share_everything_once_and_nothing_before_it_is_there(ranks):
    for results, announced, sent in ranks(3, share_at_once):
        for k, (result, shape) in enumerate(zip(results, SHAPES, strict=True)):
            assert result == torch.full(shape, 2.0 * k + 1).tolist(), k
        assert sent == announced


def strange_layouts() -> list[str]:
    dist.init_process_group("gloo")
    whole = torch.zeros(4, 4)
    line = init_device_mesh("cpu", (1,))
    grid = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    good = distribute_tensor(whole, grid, (Replicate(), Shard(1)))
    assert layout([good]) == (Grid(row=grid.get_group(1), column=grid.get_group(0)), [Matrix(whole.shape, 1)])
    said = []
    for parameters in (
        [good, whole],
        [distribute_tensor(whole, line, (Shard(0),))],
        [good, distribute_tensor(whole, grid, (Shard(0), Replicate()))],
    ):
        with pytest.raises(ValueError) as caught:
            layout(parameters)
        said.append(str(caught.value))
    return said


def test_other_layouts_are_refused(ranks):
    mixed, line, placed = ranks(1, strange_layouts)[0]
    assert mixed == line and "DTensor" in line
    assert "(Shard(dim=0), Replicate())" in placed
