"""Muon's share of a step: Newton-Schulz FLOPs and communication per rank, batched against single matrices, and
agreement with torch.optim.Muon on the shapes of UNITE-B.

    work        FLOPs of the busiest rank and the most bytes that a rank sends, for B, L and XL; counted, not timed
    times       CPU seconds on one thread for all matrices of B, one by one and batched by shape, measured in turn
    agreement   one update of each shape of B on 2 x 2 gloo processes against torch.optim.Muon in one process; its
                bfloat16 takes minutes on a CPU without bfloat16 matmuls
"""

import argparse
import os
import socket
import statistics
import time
from collections import Counter
from contextlib import nullcontext
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from unite_fast.model.unite import UNITE
from unite_fast.optim.muon import Muon, newton_schulz, newton_schulz_flops
from unite_fast.optim.param_groups import split_parameters
from unite_fast.optim.sharded_matrices import Grid, Matrix, ShardedMap
from unite_fast.recipes import load_config

SIZES = ("b", "l", "xl")
GRIDS = {
    "1": (1, 1),
    "8 ddp": (8, 1),
    "8 fsdp": (1, 8),
    "64 ddp": (64, 1),
    "64 fsdp": (1, 64),
    "64 hsdp 8 x 8": (8, 8),
}
EPS = 1e-6
BF16_BYTES = 2


def muon_shapes(size: str) -> list[torch.Size]:
    """Shapes of the matrices that Muon trains in a recipe."""
    config = load_config(f"imagenet256_{size}")
    with torch.device("meta"):
        model = UNITE(config.model)
    return [parameter.shape for parameter in split_parameters(model)[0].values()]


def work(shapes: list[torch.Size], replicas: int, shards: int) -> dict:
    """Newton-Schulz GFLOP, batches and MB sent, each on the busiest rank."""
    matrices, costs = [Matrix(shape) for shape in shapes], [newton_schulz_flops(shape) for shape in shapes]
    grids = [Grid(replicas, shards, replica, shard) for replica in range(replicas) for shard in range(shards)]
    maps = [ShardedMap(matrices, costs, grid) for grid in grids]
    loads = [0] * len(grids)
    for cost, owner in zip(costs, maps[0].owners, strict=True):
        loads[owner] += cost
    return {
        "gflop": max(loads) / 1e9,
        "everywhere": sum(costs) / 1e9,
        "batches": max(sum(bool(bucket.owned) for bucket in one.buckets) for one in maps),
        "sent_mb": max(one.elements_sent() for one in maps) * BF16_BYTES / 1e6,
    }


def print_work() -> None:
    print(
        "Newton-Schulz GFLOP per step on the busiest rank (released: all matrices on every rank); MB (10^6) of bfloat16"
    )
    print(f"{'size':5}{'matrices':>9} {'ranks':14}{'released':>9}{'ours':>9}{'ratio':>8}{'batches':>9}{'MB sent':>9}")
    for size in SIZES:
        shapes = muon_shapes(size)
        for name, grid in GRIDS.items():
            row = work(shapes, *grid)
            print(
                f"{size.upper():5}{len(shapes):9} {name:14}{row['everywhere']:9.0f}{row['gflop']:9.0f}"
                f"{row['everywhere'] / row['gflop']:8.2f}{row['batches']:9}{row['sent_mb']:9.1f}"
            )


def cpu_seconds(function, *arguments) -> float:
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def one_by_one(batch: Tensor) -> None:
    for matrix in batch:
        newton_schulz(matrix[None], EPS)


def print_times(repeats: int) -> None:
    print(f"Newton-Schulz on all matrices of B, one thread, bfloat16, CPU seconds (median of {repeats}):")
    print(f"{'shape':>14}{'matrices':>9}{'one by one':>12}{'batched':>9}{'ratio':>7}")
    sums = {one_by_one: 0.0, newton_schulz: 0.0}
    for shape, count in Counter(muon_shapes("b")).items():
        batch = torch.randn(count, *shape).bfloat16()
        newton_schulz(batch[:1], EPS)
        seconds = {one_by_one: [], newton_schulz: []}
        for _ in range(repeats):
            seconds[one_by_one].append(cpu_seconds(one_by_one, batch))
            seconds[newton_schulz].append(cpu_seconds(newton_schulz, batch, EPS))
        alone, batched = (statistics.median(seconds[function]) for function in sums)
        sums[one_by_one] += alone
        sums[newton_schulz] += batched
        print(
            f"{' x '.join(map(str, shape)):>14}{count:9}{alone:12.3f}{batched:9.3f}{alone / batched:7.2f}", flush=True
        )
    alone, batched = sums.values()
    print(f"{'all':>14}{'':9}{alone:12.3f}{batched:9.3f}{alone / batched:7.2f}")


def gradient(k: int, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(k))


def sharded_update(rank: int, port: int, shapes: list[torch.Size], dtype: torch.dtype, results: list[Tensor]) -> None:
    """One step from zero with learning rate 1, on one of four ranks; rank 0 writes the full updates to `results`."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = nn.Module()
    model.matrices = nn.ParameterList(torch.zeros(shape) for shape in shapes)
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    for k, p in enumerate(model.parameters()):
        p.grad = distribute_tensor(gradient(k, p.shape), p.device_mesh, p.placements, src_data_rank=None)
    Muon(model.parameters(), lr=1.0, momentum=0.95, eps=EPS, dtype=dtype).step()
    for result, p in zip(results, model.parameters(), strict=True):
        full = p.full_tensor().detach()
        if rank == 0:
            result.copy_(full)
    dist.destroy_process_group()


def sharded_updates(shapes: list[torch.Size], dtype: torch.dtype) -> list[Tensor]:
    results = [torch.zeros(shape).share_memory_() for shape in shapes]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(sharded_update, (port, shapes, dtype, results), nprocs=4)
    return results


def torch_update(g: Tensor, dtype: torch.dtype) -> Tensor:
    parameter = nn.Parameter(torch.zeros_like(g))
    parameter.grad = g
    optimizer = torch.optim.Muon(
        [parameter], lr=1.0, weight_decay=0.0, momentum=0.95, eps=EPS, adjust_lr_fn="match_rms_adamw"
    )
    # torch's Newton-Schulz always casts to bfloat16; patch the cast away for float32.
    in_float32 = mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone)
    with in_float32 if dtype == torch.float32 else nullcontext():
        optimizer.step()
    return parameter.detach()


def agreement(update: Tensor, reference: Tensor) -> tuple[float, float]:
    """1 - cosine, and relative error."""
    update, reference = update.double(), reference.double()
    cosine = (update * reference).sum() / (update.norm() * reference.norm())
    return 1 - float(cosine), float((update - reference).norm() / reference.norm())


def print_agreement() -> None:
    shapes = list(Counter(muon_shapes("b")))
    dtypes = (torch.float32, torch.bfloat16)
    ours = {dtype: sharded_updates(shapes, dtype) for dtype in dtypes}
    print("One update of each shape of B on 2 x 2 gloo processes against torch.optim.Muon: 1 - cosine, relative error")
    print(f"{'shape':>14}{'float32':>20}{'bfloat16':>20}")
    for k, shape in enumerate(shapes):
        errors = [agreement(ours[dtype][k], torch_update(gradient(k, shape), dtype)) for dtype in dtypes]
        columns = "".join("{:11.1e}{:9.1e}".format(*pair) for pair in errors)
        print(f"{' x '.join(map(str, shape)):>14}{columns}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="work, times or agreement [all]")
    parser.add_argument(
        "--repeats", type=int, default=1, help="for times: repetitions per shape [1, takes two minutes]"
    )
    options = parser.parse_args()
    parts = {"work": print_work, "times": lambda: print_times(options.repeats), "agreement": print_agreement}
    if unknown := set(options.parts) - parts.keys():
        parser.error(f"{unknown.pop()} is not a part; choose from {', '.join(parts)}")
    torch.set_num_threads(1)
    for part in options.parts or parts:
        parts[part]()


if __name__ == "__main__":
    main()
