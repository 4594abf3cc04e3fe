"""What start, vote and heartbeats of a run cost with many ranks, by processes without a model on one machine.

    python benchmarks/ranks.py --ranks 8 64 512
    python benchmarks/ranks.py --ranks 8 64 --full-mesh      with all gloo connections, as PyTorch makes them by default

All ranks share this machine's cores, so the times are above those of a cluster, where each rank has its own. Sockets
and messages are counts.
"""

import argparse
import multiprocessing
import os
import resource
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from unite_fast.distributed import joining
from unite_fast.distributed.launch import meet
from unite_fast.distributed.peers import Peers
from unite_fast.distributed.process_group import Ranks
from unite_fast.distributed.signals import StopVote
from unite_fast.distributed.start_check import check_same_start
from unite_fast.distributed.store import allow_many_files, fresh_store

LIMIT = 600.0
"""Seconds for each part."""
PER_MACHINE = 8
START = {f"setting {number}": number for number in range(200)}
"""About as many values as the start of a training compares."""
COLUMNS = ("join", "start check", "groups", "vote", "vote CPU", "heartbeat", "look for silence")


def rank_main(rank: int, world: int, port: int, pipe) -> None:
    per_machine = min(PER_MACHINE, world)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank % per_machine),
        "LOCAL_WORLD_SIZE": str(per_machine),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    ranks, seconds = Ranks.from_environment(), {}
    clock = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal clock
        seconds[part], clock = time.perf_counter() - clock, time.perf_counter()

    joining.begin()
    store = fresh_store(LIMIT)
    meet(store, ranks, LIMIT)
    lap("join")
    check_same_start(START, store, ranks, LIMIT)
    lap("start check")
    peers = Peers(rank, world, store)
    limit = timedelta(seconds=LIMIT)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    peers.open_groups()
    ranks.wait()
    joining.end()
    lap("groups")
    vote = StopVote(peers)
    vote.next_result()
    vote.next_result()
    lap("first vote")  # which connects
    used = resource.getrusage(resource.RUSAGE_SELF)
    vote.finish()
    vote._start()
    vote.finish()
    lap("vote")
    now = resource.getrusage(resource.RUSAGE_SELF)
    seconds["vote CPU"] = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    ranks.wait()
    clock = time.perf_counter()
    peers.beat()
    peers.trouble()
    lap("heartbeat")
    ranks.wait()
    pause = min(2.0, world / 100)
    time.sleep(2.5 * pause if rank else pause)  # the others leave rank 0 a core
    clock = time.perf_counter()
    if rank == 0:
        peers.silent_ranks()
    lap("look for silence")
    pipe.send((seconds, sockets()))
    pipe.close()
    ranks.wait()
    os._exit(0)


def sockets() -> int:
    """Open sockets of this process."""
    links = (os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
    return sum(link.startswith("socket:") for link in links)


def measure(world: int) -> tuple[dict[str, float], list[int]]:
    """Greatest seconds of any rank by part, and the sockets of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(world):
        here, there = fork.Pipe(duplex=False)
        processes.append(fork.Process(target=rank_main, args=(rank, world, port, there), daemon=True))
        processes[-1].start()
        there.close()
        pipes.append(here)
    results = []
    for rank, pipe in enumerate(pipes):
        if not pipe.poll(3 * LIMIT):
            sys.exit(f"rank {rank} of {world} does not answer")
        results.append(pipe.recv())
    for process in processes:
        process.join()
    parts = {part: max(seconds[part] for seconds, _ in results) for part in COLUMNS}
    return parts, [count for _, count in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--full-mesh", action="store_true", help="connect all with all in each group")
    arguments = parser.parse_args()
    os.environ["TORCH_GLOO_LAZY_INIT"] = "0" if arguments.full_mesh else "1"
    allow_many_files()
    print(f"{'ranks':>6}{'sockets, rank 0':>17}{'other ranks':>13}" + "".join(f"{f'{c}, s':>21}" for c in COLUMNS))
    for world in arguments.ranks:
        parts, (first, *others) = measure(world)
        numbers = "".join(f"{parts[part]:21.4f}" for part in COLUMNS)
        print(f"{world:6}{first:17}{max(others, default=0):13}{numbers}", flush=True)


if __name__ == "__main__":
    main()
