"""The order in real processes: every sample once per epoch, the same order on 1, 2 and 4 ranks, resume on other ranks,
constant memory."""

import multiprocessing
import random

import pytest
import torch
import torch.distributed as dist

from unite_fast.data_pipeline import Loader, open_source

SIZE = 32
BATCH = 12
BATCHES = 12  # more than three epochs of 41


def rank_main(rank, world, kind, path, workers, start, batches, store, results):
    """One rank of a gloo group: reads its slices; rank 0 returns the global batches."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    source = open_source(kind, path, SIZE, "train")
    batches_read = []
    with Loader(source, BATCH, 7, workers, rank=rank, world=world) as loader:
        loader.load_state_dict({"batch": start, "skipped": []})
        for _ in range(batches):
            batch = next(loader)
            parts = [torch.empty(BATCH // world, 2, dtype=torch.int64) for _ in range(world)]
            # The sum of the pixels identifies an image.
            sums = batch.data.flatten(1).sum(1, dtype=torch.int64)
            dist.all_gather(parts, torch.stack([batch.ids, sums], 1))
            batches_read.append(torch.cat(parts).tolist())
        states = [None] * world
        dist.all_gather_object(states, loader.state_dict())
    if rank == 0:
        results.put((batches_read, states))
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path):
    """Starts a group of processes; returns the global batches, and the loader's state on every rank."""
    numbers = iter(range(1000))

    def start(kind, path, world, workers=0, start=0, batches=BATCHES):
        fork = multiprocessing.get_context("fork")
        results = fork.Queue()
        arguments = (world, kind, str(path), workers, start, batches, tmp_path / f"store{next(numbers)}", results)
        ranks = [fork.Process(target=rank_main, args=(rank, *arguments)) for rank in range(world)]
        for process in ranks:
            process.start()
        result = results.get(timeout=120)
        for process in ranks:
            process.join(60)
            assert process.exitcode == 0
        return result

    return start


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("format", ["raw", "original"])
def test_the_order_does_not_depend_on_ranks_and_workers(run, shards, image_folder, format, workers):
    source = open_source("folder", str(image_folder), SIZE, "train")
    sums = source.read(range(41))[0].flatten(1).sum(1, dtype=torch.int64).tolist()
    expected, _ = run("shards", shards(format), 1)
    for world in (1, 2, 4):
        assert run("shards", shards(format), world, workers)[0] == expected
    stream = [pair for batch in expected for pair in batch]
    for epoch in range(3):
        ids = [index for index, _ in stream[41 * epoch : 41 * (epoch + 1)]]
        assert sorted(ids) == list(range(41))
    assert all(sums[index] == total for index, total in stream)


def test_resume_at_ten_random_batches_on_other_ranks(run, shards):
    expected, _ = run("shards", shards("raw"), 1)
    generator = random.Random(4)
    for stop in generator.sample(range(1, BATCHES - 1), 10):
        before, after = generator.sample([1, 2, 4], 2)
        _, states = run("shards", shards("raw"), before, batches=stop)
        assert all(state == {"batch": stop, "skipped": []} for state in states), "every rank has the same state"
        actual, _ = run("shards", shards("raw"), after, start=states[0]["batch"], batches=min(3, BATCHES - stop))
        assert actual == expected[stop : stop + 3]


def test_eight_ranks_share_the_batches(shards):
    source = open_source("shards", str(shards("raw")), SIZE, "train")
    with Loader(source, 16, 3) as whole:
        expected = [next(whole).ids for _ in range(6)]
    ranks = [Loader(source, 16, 3, rank=rank, world=8) for rank in range(8)]
    for expected_ids in expected:
        assert torch.equal(torch.cat([next(loader).ids for loader in ranks]), expected_ids)


@pytest.mark.parametrize("format, workers", [("raw", 0), ("raw", 2), ("original", 2)])
def test_memory_does_not_grow_over_epochs(shards, assert_flat_memory, format, workers):
    source = open_source("shards", str(shards(format)), SIZE, "train")
    with Loader(source, 41, 0, workers) as loader:
        assert_flat_memory(loader)
