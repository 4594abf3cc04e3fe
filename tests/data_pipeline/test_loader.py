"""The order of samples depends only on the seed; broken samples; worker threads and processes."""

import gc
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from unite_fast.data_pipeline import Loader, Source, UnreadableSample, open_source
from unite_fast.errors import UserError


class Numbers(Source):
    """Image and label i hold i. Some samples are broken; reading can be slow, and can crash or kill its process."""

    image_size = 2
    class_names: ClassVar = ["number"]

    def __init__(self, n, bad=(), workers="threads", seconds=0.0, crash=None, kill=None):
        self.n, self.bad, self.workers, self.seconds = n, set(bad), workers, seconds
        self.crash, self.kill = crash, kill
        self.reads = []

    def __len__(self):
        return self.n

    def class_counts(self):
        return [self.n]

    def name(self, index):
        return f"number {index}"

    def read_into(self, index, image):
        self.reads.append(index)
        # Later samples are read faster, so workers finish out of order.
        time.sleep(self.seconds * (self.n - index) / self.n)
        if index == self.crash:
            raise RuntimeError(f"sample {index} crashed")
        if index == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if index in self.bad:
            raise UnreadableSample(self.name(index), "broken")
        image[:] = index % 256
        return index


def take(loader, batches):
    return [next(loader) for _ in range(batches)]


def ids(batches):
    return torch.cat([batch.ids for batch in batches]).tolist()


READING = {
    "in memory": ("none", 0),
    "no workers": ("processes", 0),
    "1 thread": ("threads", 1),
    "3 threads": ("threads", 3),
    "1 process": ("processes", 1),
    "3 processes": ("processes", 3),
}


@pytest.fixture(params=READING)
def reading(request):
    """Makes a loader, with each kind of workers."""
    kind, workers = READING[request.param]

    def make(n, batch_size, seed=0, seconds=0.0, **options):
        return Loader(Numbers(n, workers=kind, seconds=seconds), batch_size, seed, workers=workers, **options)

    return make


@pytest.mark.parametrize("n, batch_size", [(10, 4), (12, 4), (5, 8), (3, 10), (1, 1), (7, 1)])
def test_every_sample_appears_once_per_epoch(reading, n, batch_size):
    epochs = 6
    with reading(n, batch_size) as loader:
        stream = ids(take(loader, -(-epochs * n // batch_size)))
    orders = [stream[epoch * n : (epoch + 1) * n] for epoch in range(epochs)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n >= 10:
        assert len(set(map(tuple, orders))) == epochs, "every epoch has its own order"


def test_images_and_labels_belong_to_the_ids(reading):
    with reading(10, 4) as loader:
        for k, batch in enumerate(take(loader, 5)):
            assert batch.data.dtype == torch.uint8 and batch.data.shape == (4, 3, 2, 2)
            assert batch.labels.dtype == batch.ids.dtype == torch.int64
            assert torch.equal(batch.ids, loader.batch_indices(k))
            assert torch.equal(batch.labels, batch.ids)
            assert torch.equal(batch.data[:, 0, 0, 0].long(), batch.ids)
    assert loader.skipped == {}


def test_the_seed_determines_the_order(reading):
    with reading(50, 10, seed=1) as one, reading(50, 10, seed=1) as same, reading(50, 10, seed=2) as other:
        stream = ids(take(one, 5))
        assert stream == ids(take(same, 5))
        assert stream != ids(take(other, 5))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_global_batch(reading, world):
    with reading(10, 8, seed=3) as whole:
        expected = [batch.ids for batch in take(whole, 6)]
    ranks = [reading(10, 8, seed=3, rank=rank, world=world) for rank in range(world)]
    for expected_ids in expected:
        assert torch.equal(torch.cat([next(loader).ids for loader in ranks]), expected_ids)
    for loader in ranks:
        loader.close()


def test_resume_at_any_batch(reading):
    with reading(23, 5) as whole:
        expected = [batch.ids for batch in take(whole, 30)]
    for stop in random.Random(0).sample(range(25), 6):
        with reading(23, 5) as before:
            take(before, stop)
            state = before.state_dict()
        assert state == {"batch": stop, "skipped": []}
        with reading(23, 5) as after, reading(23, 5, start=stop) as started:
            next(after)  # the batches read ahead are dropped
            after.load_state_dict(state)
            for expected_ids in expected[stop : stop + 5]:
                assert torch.equal(next(after).ids, expected_ids)
                assert torch.equal(next(started).ids, expected_ids)


def test_batch_indices_far_into_a_run_are_computed_directly():
    loader = Loader(Numbers(7), 5, seed=0)
    assert sorted(torch.cat([loader.batch_indices(7 * 10**8 + k) for k in range(7)]).tolist()) == sorted(
        list(range(7)) * 5
    )


@pytest.mark.parametrize("kind, workers", [("threads", 0), ("threads", 3), ("processes", 3)])
def test_broken_samples_are_replaced_and_named_once(kind, workers, caplog):
    bad = {3, 4, 19}
    source = Numbers(20, bad, kind, seconds=0.002 * workers)
    with Loader(source, 8, seed=0, workers=workers) as loader, caplog.at_level(logging.WARNING, "unite_fast.data"):
        for k, batch in enumerate(take(loader, 10)):
            expected_ids = [{3: 5, 4: 5, 19: 0}.get(index, index) for index in loader.batch_indices(k).tolist()]
            assert batch.ids.tolist() == expected_ids
            assert batch.labels.tolist() == expected_ids
            assert batch.data[:, 2, 1, 1].tolist() == expected_ids
        stream = [index for k in range(10) for index in loader.batch_indices(k).tolist()]
    order = list(dict.fromkeys(name for index in stream for name in {3: (3, 4), 4: (4,), 19: (19,)}.get(index, ())))
    assert list(loader.skipped.items()) == [(f"number {index}", "broken") for index in order]
    assert [record.getMessage() for record in caplog.records] == [f"skipped number {index}: broken" for index in order]
    if workers == 0:
        assert all(source.reads.count(index) == 1 for index in bad), "a broken sample is tried once per run"


def test_skipped_samples_are_restored_by_a_resume(caplog):
    with Loader(Numbers(20, {3}), 20, seed=0) as before:
        next(before)
        state = before.state_dict()
    assert state == {"batch": 1, "skipped": [["number 3", "broken"]]}
    caplog.clear()
    with Loader(Numbers(20, {3}), 20, seed=0) as after:
        after.load_state_dict(state)
        next(after)
    assert after.skipped == {"number 3": "broken"}
    assert not caplog.records, "reported before the resume"


def test_a_prefetched_broken_sample_is_reported_with_its_batch():
    with Loader(Numbers(40, {7}), 4, seed=0, workers=2) as loader:
        first = next(k for k in range(10) if 7 in loader.batch_indices(k))
        for k in range(10):
            next(loader)
            assert bool(loader.skipped) == (k >= first)


@pytest.mark.parametrize("kind, workers", [("threads", 0), ("threads", 3), ("processes", 3)])
@pytest.mark.parametrize(
    "n, bad, stops",
    [
        (1, 1, True),
        (5, 5, True),
        (5, 4, False),
        (50, 9, False),
        (50, 10, True),
        (200, 20, False),
        (200, 21, True),
        (300, 300, True),
    ],
)
def test_too_many_broken_samples_stop_the_run(kind, workers, n, bad, stops):
    broken = random.Random(1).sample(range(n), bad)
    with Loader(Numbers(n, broken, kind), n, seed=0, workers=workers) as loader:
        if not stops:
            take(loader, 2)
            assert len(loader.skipped) == bad
            return
        with pytest.raises(UserError, match=rf"\b{n}\b.*number \d+.*broken") as caught:
            take(loader, 2)
        assert "\n" not in str(caught.value)


def test_a_long_run_of_broken_samples_stops_early():
    source = Numbers(1000, range(1000))
    with Loader(source, 4, seed=0) as loader, pytest.raises(UserError):
        next(loader)
    assert len(source.reads) == 101


@pytest.mark.parametrize("kind, workers", [("threads", 0), ("threads", 2), ("processes", 2)])
def test_a_crash_in_a_worker_is_raised_and_closes_the_loader(kind, workers):
    threads = threading.active_count()
    loader = Loader(Numbers(30, (), kind, crash=11, seconds=0.001), 3, seed=0, workers=workers)
    before = next(k for k in range(10) if 11 in loader.batch_indices(k))
    take(loader, before)
    with pytest.raises(RuntimeError, match="sample 11 crashed"):
        next(loader)
    assert threading.active_count() == threads and not multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    loader.close()


def test_closing_early_ends_the_threads_and_does_not_read_the_queue():
    threads = threading.active_count()
    source = Numbers(1000, seconds=0.02)
    with Loader(source, 100, seed=0, workers=4) as loader:
        next(loader)
    assert threading.active_count() == threads
    assert len(source.reads) < 300, "three batches are queued"


@pytest.mark.parametrize("by_signal", [True, False])
def test_a_killed_process_is_one_error_line_and_no_hang(by_signal, mentions):
    """Killed while it reads, as when it takes too much memory, or while it waits for work."""
    loader = Loader(Numbers(30, (), "processes", kill=11 if by_signal else None), 3, seed=0, workers=2)
    before = next(k for k in range(10) if 11 in loader.batch_indices(k))
    take(loader, before)
    if not by_signal:
        next(loader)
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    start = time.monotonic()
    with pytest.raises(UserError, match=mentions("killed", "data.workers", "--resume")) as caught:
        take(loader, 5)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 5
    assert not multiprocessing.active_children()


def test_processes_end_when_their_parent_is_killed(tmp_path):
    code = f"""
import os, sys, multiprocessing
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_loader import Loader, Numbers
loader = Loader(Numbers(1000, (), "processes"), 10, seed=0, workers=3)
next(loader)
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), 9)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    children = [int(word) for word in ended.stdout.split()]
    assert len(children) == 3, ended.stderr
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)


def test_a_deleted_loader_ends_its_processes():
    loader = Loader(Numbers(20, (), "processes"), 4, seed=0, workers=2)
    next(loader)
    assert len(multiprocessing.active_children()) == 2
    del loader
    gc.collect()
    assert not multiprocessing.active_children()


def test_a_deleted_loader_ends_its_threads():
    threads = threading.active_count()
    loader = Loader(Numbers(20), 4, seed=0, workers=2)
    next(loader)
    del loader
    deadline = time.monotonic() + 20
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_two_batches_are_read_ahead():
    source = Numbers(100)
    with Loader(source, 5, seed=0, workers=2) as loader:
        next(loader)
        deadline = time.monotonic() + 20
        while len(source.reads) < 15 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(source.reads) == 15


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="/proc/self/task does not exist")
def test_workers_start_no_threads_of_their_own(tmp_path):
    (tmp_path / "a").mkdir()
    for index in range(8):
        Image.new("RGB", (256, 256)).save(tmp_path / "a" / f"{index}.png")
    before, threads = len(os.listdir("/proc/self/task")), torch.get_num_threads()
    torch.set_num_threads(4)  # on a machine with one core the default would hide a thread pool
    try:
        source = open_source("folder", str(tmp_path), 256, "train")
        source.workers = "threads"
        with Loader(source, 8, seed=0, workers=2) as loader:
            take(loader, 2)
            assert len(os.listdir("/proc/self/task")) <= before + 2
    finally:
        torch.set_num_threads(threads)


def test_wrong_arguments_are_refused():
    source = Numbers(10)
    for arguments in ({"batch_size": 0}, {"batch_size": 6, "world": 4}, {"batch_size": 4, "workers": -1}):
        with pytest.raises(UserError):
            Loader(source, seed=0, **arguments)
    with pytest.raises(ValueError, match="rank 2"):
        Loader(source, 4, seed=0, rank=2, world=2)


def test_workers_do_not_change_the_batches_of_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(24):
        file = tmp_path / f"class{index % 3}" / f"{index}.jpg"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(file)
        if index in (5, 8):
            file.write_bytes(file.read_bytes()[:-300])
    source = open_source("folder", str(tmp_path), 16, "train")
    with Loader(source, 7, seed=4) as plain, Loader(source, 7, seed=4, workers=3) as parallel:
        for one, other in zip(take(plain, 8), take(parallel, 8), strict=True):
            assert torch.equal(one.data, other.data)
            assert torch.equal(one.labels, other.labels)
            assert torch.equal(one.ids, other.ids)
    assert list(plain.skipped.items()) == list(parallel.skipped.items())
    assert {name.replace("\\", "/") for name in plain.skipped} == {"class2/5.jpg", "class2/8.jpg"}
