"""The reader that pins batches ahead of need: the same batches in order, the same errors, no hang."""

import gc
import multiprocessing
import os
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from unite_fast.data_pipeline import Loader, Source, UnreadableSample, choose_loader
from unite_fast.data_pipeline.pinning import PinnedReader
from unite_fast.data_pipeline.readers import open_reader
from unite_fast.errors import UserError

N = 40


class Numbers(Source):
    image_size = 2
    class_names: ClassVar = ["number"]

    def __init__(self, workers, bad=(), kill=None, seconds=0.0):
        self.workers, self.bad, self.kill, self.seconds = workers, set(bad), kill, seconds

    def __len__(self):
        return N

    def class_counts(self):
        return [N]

    def name(self, index):
        return f"number {index}"

    def read_into(self, index, image):
        time.sleep(self.seconds)
        if index == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if index in self.bad:
            raise UnreadableSample(self.name(index), "broken")
        image[:] = index
        return index


class Pin:
    """Stands in for pinning: changes the images, and records the threads that call it."""

    def __init__(self, seconds=0.0):
        self.threads, self.seconds, self.count = set(), seconds, 0

    def __call__(self, batch):
        self.threads.add(threading.get_ident())
        self.count += 1
        time.sleep(self.seconds)
        return replace(batch, data=batch.data + 100)


def loader(source, workers, pin, batch=4, **options):
    return Loader(
        source, batch, 3, workers, reader=lambda *arguments: PinnedReader(open_reader(*arguments), pin), **options
    )


READING = [("none", 0), ("processes", 0), ("threads", 2), ("processes", 2)]


@pytest.mark.parametrize(("kind", "workers"), READING)
@pytest.mark.parametrize("slow", [0.0, 0.01])
def test_batches_and_their_order_are_unchanged(kind, workers, slow):
    pin = Pin(slow)
    with Loader(Numbers(kind), 4, 3, workers) as plain, loader(Numbers(kind), workers, pin) as pinned:
        for _ in range(25):
            one, other = next(plain), next(pinned)
            assert torch.equal(one.ids, other.ids)
            assert torch.equal(one.labels, other.labels)
            assert torch.equal(one.data + 100, other.data)
            assert plain.state_dict() == pinned.state_dict()
    assert len(pin.threads) == 1 and threading.get_ident() not in pin.threads


@pytest.mark.parametrize(("kind", "workers"), READING)
def test_batches_are_pinned_ahead_of_need(kind, workers, wait_until):
    pin = Pin()
    with loader(Numbers(kind), workers, pin) as pinned:
        next(pinned)
        wait_until(lambda: pin.count >= 2)


@pytest.mark.parametrize(("kind", "workers"), READING[1:])
def test_resume_with_broken_samples(kind, workers):
    bad = {3, 4, 19}
    with loader(Numbers(kind, bad), workers, Pin()) as whole:
        expected = [next(whole) for _ in range(20)]
        skipped = dict(whole.skipped)
    assert len(skipped) == 3
    with loader(Numbers(kind, bad), workers, Pin()) as before:
        for _ in range(7):
            next(before)
        state = before.state_dict()
    with loader(Numbers(kind, bad), workers, Pin()) as after:
        next(after)
        after.load_state_dict(state)
        for expected_batch in expected[7:]:
            assert torch.equal(next(after).ids, expected_batch.ids)
        assert after.skipped == skipped


def test_broken_samples_and_killed_workers_raise_in_next(mentions):
    with (
        loader(Numbers("threads", range(N)), 2, Pin()) as pinned,
        pytest.raises(UserError, match=mentions(N, "broken")),
    ):
        next(pinned)
    start = time.monotonic()
    with (
        loader(Numbers("processes", kill=11), 2, Pin()) as pinned,
        pytest.raises(UserError, match=mentions("killed", "data.workers")),
    ):
        for _ in range(20):
            next(pinned)
    assert time.monotonic() - start < 10
    assert not multiprocessing.active_children()


def test_an_error_while_pinning_raises_in_next():
    def pin(batch):
        raise RuntimeError("no memory")

    with loader(Numbers("none"), 0, pin) as pinned, pytest.raises(RuntimeError, match="no memory"):
        next(pinned)


@pytest.mark.parametrize(("kind", "workers"), READING)
def test_close_never_hangs(kind, workers):
    threads = threading.active_count()
    for delay in (0.0, 0.003, 0.02):
        pinned = loader(Numbers(kind, seconds=0.003), workers, Pin(0.005), batch=8)
        next(pinned)
        time.sleep(delay)
        start = time.monotonic()
        pinned.close()
        pinned.close()
        assert time.monotonic() - start < 5
    assert threading.active_count() == threads and not multiprocessing.active_children()


def test_a_deleted_loader_ends_its_processes():
    pinned = loader(Numbers("processes"), 2, Pin())
    for _ in range(3):
        next(pinned)
    del pinned
    end = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    assert not multiprocessing.active_children()


def test_batches_are_pinned_only_for_a_cuda_device(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: calls.append(device) or nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append("pinned") or tensor)
    source, cuda = Numbers("none"), torch.device("cuda", 1)
    assert choose_loader("auto", source, torch.device("cpu")).reader is open_reader
    with Loader(source, 4, 0, reader=choose_loader("auto", source, cuda).reader) as made:
        next(made)
    assert calls[:3] == [cuda, "pinned", "pinned"], "on the device of this process"
