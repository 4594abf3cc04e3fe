"""How the samples of a batch are read: on the caller's thread, by threads or by processes ahead of need."""

import itertools
import mmap
import multiprocessing
import signal
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from unite_fast.data_pipeline.source import Source, UnreadableSample
from unite_fast.errors import UserError

Bad = tuple[str, str]
"""Name of a broken sample, and the reason."""

# Beyond both, the data is at fault, not a few files of it.
_BAD_FRACTION, _BAD_COUNT = 0.1, 10


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        images: uint8 [b, 3, image_size, image_size], on a GPU where one decoded them.
        labels: int64 [b].
        ids: int64 [b], the samples' numbers in the source.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor


class Reader(Protocol):
    """Reads one batch after another, in the order in which they were begun.

    Attributes:
        ahead: how many batches it likes to have begun besides the one that is taken.
    """

    ahead: int

    def begin(self, wanted: list[int]) -> None:
        """Queue a batch: the samples of this rank's places."""

    def take(self) -> tuple[Batch, list[Bad]]:
        """Wait for the oldest batch begun. A broken sample's place holds the next one in the source that reads; what
        was broken is returned in the order of the places."""

    def close(self) -> None:
        """Stop, whatever is under way."""


OpenReader = Callable[[Source, int, int], Reader]
"""From source, samples of a batch and number of workers."""


def open_reader(source: Source, b: int, workers: int) -> Reader:
    """The reader that decodes as Pillow does, with the kind of workers that the source wants."""
    if source.workers == "none":
        return MemoryReader(source)
    if workers == 0:
        return InlineReader(source, b)
    return ThreadReader(source, b, workers) if source.workers == "threads" else ProcessReader(source, b, workers)


def check_share(count: int, n: int, last: Bad) -> None:
    """
    Raises:
        UserError: so many of `n` samples are broken that there is no point in going on.
    """
    if count >= n or (count >= _BAD_COUNT and count > _BAD_FRACTION * n):
        name, reason = last
        raise UserError(f"{count} of {n} samples cannot be read, the last one {name} ({reason}): mend or remove")


def first_readable(source: Source, index: int, read: Callable[[int], object], known: dict[int, Bad], bad: list[Bad]):
    """`read(index)`, or of the next sample in the source that is not broken; returns its number and what `read` gave.

    Args:
        known: broken samples met so far by this thread or process, which are not tried again; added to.
        bad: the broken ones passed over here are appended.
    """
    passed = 0
    while True:
        if index not in known:
            try:
                return index, read(index)
            except UnreadableSample as error:
                # Not the exception itself: its traceback would keep the batch alive.
                known[index] = (error.name, error.reason)
        bad.append(known[index])
        passed += 1
        check_share(passed, len(source), bad[-1])
        index = (index + 1) % len(source)


@dataclass(frozen=True)
class _Arrays:
    """The memory of a batch as numpy sees it: each thread that copies with torch starts a pool of threads.

    Attributes:
        images: uint8 [b, 3, size, size].
        numbers: labels and ids, int64 [2, b].
    """

    images: np.ndarray
    numbers: np.ndarray

    @classmethod
    def empty(cls, b: int, size: int) -> "_Arrays":
        return cls(np.empty((b, 3, size, size), np.uint8), np.empty((2, b), np.int64))

    @classmethod
    def shared(cls, b: int, size: int) -> "_Arrays":
        """Memory that forked processes see; not /dev/shm, which is small in many containers."""
        images = np.frombuffer(mmap.mmap(-1, b * 3 * size * size), np.uint8).reshape(b, 3, size, size)
        return cls(images, np.frombuffer(mmap.mmap(-1, 16 * b), np.int64).reshape(2, b))

    def fill(self, source: Source, first: int, wanted: list[int], known: dict[int, Bad]) -> list[Bad]:
        """Read samples into the places from `first` on; returns the broken ones that were passed over."""
        bad: list[Bad] = []
        for place, index in enumerate(wanted, first):
            image = self.images[place]
            index, label = first_readable(source, index, lambda i, image=image: source.read_into(i, image), known, bad)
            self.numbers[:, place] = label, index
        return bad

    def batch(self) -> Batch:
        labels, ids = torch.from_numpy(self.numbers)
        return Batch(torch.from_numpy(self.images), labels, ids)

    def copy(self) -> "_Arrays":
        return _Arrays(self.images.copy(), self.numbers.copy())


class MemoryReader:
    ahead = 0

    def __init__(self, source: Source):
        self.source = source

    def begin(self, wanted: list[int]) -> None:
        self.wanted = torch.tensor(wanted)

    def take(self) -> tuple[Batch, list[Bad]]:
        return Batch(*self.source.read(self.wanted), self.wanted), []

    def close(self) -> None:
        pass


class InlineReader:
    ahead = 0

    def __init__(self, source: Source, b: int):
        self.source, self.b = source, b
        self.known: dict[int, Bad] = {}

    def begin(self, wanted: list[int]) -> None:
        self.wanted = wanted

    def take(self) -> tuple[Batch, list[Bad]]:
        arrays = _Arrays.empty(self.b, self.source.image_size)
        bad = arrays.fill(self.source, 0, self.wanted, self.known)
        return arrays.batch(), bad

    def close(self) -> None:
        pass


def _shares(b: int, workers: int) -> list[slice]:
    """Each worker's places of every batch."""
    edges = [b * worker // workers for worker in range(workers + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


class ThreadReader:
    ahead = 2

    def __init__(self, source: Source, b: int, workers: int):
        self.source, self.b, self.shares = source, b, _shares(b, workers)
        self.known: dict[int, Bad] = {}
        self.begun: deque[tuple[_Arrays, list[Future]]] = deque()
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="unite_fast-read")

    def begin(self, wanted: list[int]) -> None:
        arrays = _Arrays.empty(self.b, self.source.image_size)
        submit = self.pool.submit
        parts = [submit(arrays.fill, self.source, s.start, wanted[s], self.known) for s in self.shares]
        self.begun.append((arrays, parts))

    def take(self) -> tuple[Batch, list[Bad]]:
        arrays, parts = self.begun.popleft()
        bad = [item for part in parts for item in part.result()]
        return arrays.batch(), bad

    def close(self) -> None:
        """Waits for the shares under way, one a worker."""
        self.begun.clear()
        self.pool.shutdown(wait=True, cancel_futures=True)


class ProcessReader:
    """Forked processes that write into memory they share with this one. Each has its share of every batch, so the
    first batch is there as soon as any."""

    ahead = 2

    def __init__(self, source: Source, b: int, workers: int):
        self.shares = _shares(b, workers)
        self.slots = [_Arrays.shared(b, source.image_size) for _ in range(self.ahead + 1)]
        self.count_begun = self.count_taken = 0
        fork = multiprocessing.get_context("fork")
        self.processes, self.ends = [], []
        for share in self.shares:
            ours, theirs = fork.Pipe()
            self.ends.append(ours)
            arguments = (theirs, self.ends, source, self.slots, share.start)
            process = fork.Process(target=_serve, args=arguments, daemon=True)
            with warnings.catch_warnings():
                # Python warns of locks that a forked child inherits; ours runs numpy, Pillow and one thread.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            self.processes.append(process)
        self.stop = weakref.finalize(self, _end, self.processes, self.ends)

    def begin(self, wanted: list[int]) -> None:
        for end, share in zip(self.ends, self.shares, strict=True):
            try:
                end.send((self.count_begun % len(self.slots), wanted[share]))
            except OSError:
                self.killed()
        self.count_begun += 1

    def take(self) -> tuple[Batch, list[Bad]]:
        bad = []
        for end, process in zip(self.ends, self.processes, strict=True):
            if end not in wait([end, process.sentinel]):
                self.killed()
            try:
                reply = end.recv()
            except (EOFError, OSError):
                self.killed()
            if isinstance(reply, Exception):
                raise reply
            bad += reply
        slot = self.slots[self.count_taken % len(self.slots)]
        self.count_taken += 1
        return slot.copy().batch(), bad

    def killed(self) -> None:
        raise UserError(
            "a process that reads images was killed, perhaps for want of memory: lower data.workers, "
            "then go on from the last checkpoint with --resume"
        )

    def close(self) -> None:
        self.stop()


def _serve(end: Connection, inherited: list[Connection], source: Source, slots: list[_Arrays], first: int) -> None:
    """A worker's life: samples wanted in, broken ones out, until the other end is gone."""
    for other in inherited:
        other.close()  # or this copy would keep the other end open when the trainer is killed
    # Ctrl-C reaches every process of a terminal, and what torchrun and Slurm send, every process of a group. Only the
    # trainer knows when it is done, and its end closes the pipe.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    known: dict[int, Bad] = {}
    try:
        while True:
            slot, wanted = end.recv()
            try:
                reply = slots[slot].fill(source, first, wanted, known)
            except UserError as error:
                reply = error
            except Exception:
                reply = RuntimeError(f"in a process that reads images:\n{traceback.format_exc()}")
            end.send(reply)
    except (EOFError, OSError):
        return


def _end(processes: list, ends: list[Connection]) -> None:
    for process, end in zip(processes, ends, strict=True):
        process.kill()
        process.join()
        end.close()
