"""Read the samples of a batch: on the caller's thread, or ahead of need by worker threads or processes."""

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
from typing import NoReturn, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from unite_fast.data_pipeline.source import Source, UnreadableSample
from unite_fast.errors import TemporaryError, UserError

Result = TypeVar("Result")
Broken = tuple[str, str]
"""A broken sample: its name and the reason."""

# A run stops when the broken samples exceed both limits: then the dataset is at fault, not a few files.
_BROKEN_FRACTION, _BROKEN_COUNT = 0.1, 10


@dataclass(frozen=True)
class Batch:
    """One rank's slice of a global batch.

    Attributes:
        data: images uint8 [b, 3, image_size, image_size], on the GPU if it decoded them; or atoms of molecules, float32
            [b, T, 4].
        labels: int64 [b].
        ids: int64 [b], the samples' indices in the source.
    """

    data: Tensor
    labels: Tensor
    ids: Tensor


class Reader(Protocol):
    """Reads batches in the order in which they are begun.

    Attributes:
        ahead: number of batches to read ahead of the next one.
    """

    ahead: int

    def begin(self, indices: list[int]) -> None:
        """Start to read a batch: the samples at `indices` of the source."""

    def take(self) -> tuple[Batch, list[Broken]]:
        """Wait for the oldest batch begun. Each broken sample is replaced by the next readable one in the source, and
        returned as well, in the order of the batch."""
        ...

    def close(self) -> None:
        """Stop, even in the middle of a batch."""


OpenReader = Callable[[Source, int, int], Reader]
"""(source, samples per batch, number of workers) -> a reader."""


def open_reader(source: Source, b: int, workers: int) -> Reader:
    """The reader for any source but DALI's, with the kind of workers in `source.workers`."""
    if source.workers == "none":
        return MemoryReader(source)
    if workers == 0:
        return InlineReader(source, b)
    return ThreadReader(source, b, workers) if source.workers == "threads" else ProcessReader(source, b, workers)


def check_broken_fraction(count: int, n: int, last: Broken) -> None:
    """
    Raises:
        UserError: too many of `n` samples are broken: all, or more than 10 % and at least 10.
    """
    if count >= n or (count >= _BROKEN_COUNT and count > _BROKEN_FRACTION * n):
        name, reason = last
        raise UserError(f"{count} of {n} samples cannot be read, the last one {name} ({reason}): repair or remove them")


def first_readable(
    source: Source, index: int, read: Callable[[int], Result], known_broken: dict[int, Broken], broken: list[Broken]
) -> tuple[int, Result]:
    """Call `read(index)`; if that sample is broken, try the next ones in the source until one is readable.

    Args:
        known_broken: broken samples found so far by this thread or process. They are not tried again; new ones are
            added.
        broken: the samples skipped in this call are appended.

    Returns:
        The index of the readable sample, and the result of `read`.
    """
    skipped = 0
    while True:
        if index not in known_broken:
            try:
                return index, read(index)
            except UnreadableSample as error:
                # Keep the text and not the exception, whose traceback would keep the batch alive.
                known_broken[index] = (error.name, error.reason)
        broken.append(known_broken[index])
        skipped += 1
        check_broken_fraction(skipped, len(source), broken[-1])
        index = (index + 1) % len(source)


@dataclass(frozen=True)
class _Arrays:
    """The memory of a batch, as numpy arrays: a copy in torch would start a thread pool in every worker thread.

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
        """Memory shared with forked processes. Anonymous, since /dev/shm is small in many containers."""
        images = np.frombuffer(mmap.mmap(-1, b * 3 * size * size), np.uint8).reshape(b, 3, size, size)
        return cls(images, np.frombuffer(mmap.mmap(-1, 16 * b), np.int64).reshape(2, b))

    def fill(self, source: Source, first: int, indices: list[int], known_broken: dict[int, Broken]) -> list[Broken]:
        """Read samples into positions `first`, `first` + 1, ...; returns the broken ones that were skipped."""
        broken: list[Broken] = []
        for position, index in enumerate(indices, first):
            image = self.images[position]
            index, label = first_readable(
                source, index, lambda i, image=image: source.read_into(i, image), known_broken, broken
            )
            self.numbers[:, position] = label, index
        return broken

    def batch(self) -> Batch:
        labels, ids = torch.from_numpy(self.numbers)
        return Batch(torch.from_numpy(self.images), labels, ids)

    def copy(self) -> "_Arrays":
        return _Arrays(self.images.copy(), self.numbers.copy())


class MemoryReader:
    """Copies from a source in memory."""

    ahead = 0

    def __init__(self, source: Source):
        self.source = source

    def begin(self, indices: list[int]) -> None:
        self.indices = torch.tensor(indices)

    def take(self) -> tuple[Batch, list[Broken]]:
        return Batch(*self.source.read(self.indices), self.indices), []

    def close(self) -> None:
        pass


class InlineReader:
    """Reads on the caller's thread."""

    ahead = 0

    def __init__(self, source: Source, b: int):
        self.source, self.b = source, b
        self.known_broken: dict[int, Broken] = {}

    def begin(self, indices: list[int]) -> None:
        self.indices = indices

    def take(self) -> tuple[Batch, list[Broken]]:
        arrays = _Arrays.empty(self.b, self.source.image_size)
        broken = arrays.fill(self.source, 0, self.indices, self.known_broken)
        return arrays.batch(), broken

    def close(self) -> None:
        pass


def _shares(b: int, workers: int) -> list[slice]:
    """Each worker's slice of a batch."""
    edges = [b * worker // workers for worker in range(workers + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


class ThreadReader:
    """Worker threads; each reads the same share of every batch."""

    ahead = 2

    def __init__(self, source: Source, b: int, workers: int):
        self.source, self.b, self.shares = source, b, _shares(b, workers)
        self.known_broken: dict[int, Broken] = {}
        self.begun: deque[tuple[_Arrays, list[Future]]] = deque()
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="unite_fast-read")

    def begin(self, indices: list[int]) -> None:
        arrays = _Arrays.empty(self.b, self.source.image_size)
        submit = self.pool.submit
        parts = [submit(arrays.fill, self.source, s.start, indices[s], self.known_broken) for s in self.shares]
        self.begun.append((arrays, parts))

    def take(self) -> tuple[Batch, list[Broken]]:
        arrays, parts = self.begun.popleft()
        broken = [item for part in parts for item in part.result()]
        return arrays.batch(), broken

    def close(self) -> None:
        """Waits for the shares that are being read, one per worker."""
        self.begun.clear()
        self.pool.shutdown(wait=True, cancel_futures=True)


class ProcessReader:
    """Forked worker processes that write into shared memory. Each reads its share of every batch, so the first batch
    is ready as early as possible."""

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
                # Python warns that a forked child inherits locks. Ours runs only numpy and Pillow, on one thread.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            self.processes.append(process)
        self.stop = weakref.finalize(self, _end, self.processes, self.ends)

    def begin(self, indices: list[int]) -> None:
        for end, share in zip(self.ends, self.shares, strict=True):
            try:
                end.send((self.count_begun % len(self.slots), indices[share]))
            except OSError:
                self.raise_killed()
        self.count_begun += 1

    def take(self) -> tuple[Batch, list[Broken]]:
        broken = []
        for end, process in zip(self.ends, self.processes, strict=True):
            if end not in wait([end, process.sentinel]):
                self.raise_killed()
            try:
                reply = end.recv()
            except (EOFError, OSError):
                self.raise_killed()
            if isinstance(reply, Exception):
                raise reply
            broken += reply
        slot = self.slots[self.count_taken % len(self.slots)]
        self.count_taken += 1
        return slot.copy().batch(), broken

    def raise_killed(self) -> NoReturn:
        raise TemporaryError(
            "a data worker process was killed, perhaps out of memory: lower data.workers, "
            "then resume from the last checkpoint with --resume"
        )

    def close(self) -> None:
        self.stop()


def _serve(end: Connection, inherited: list[Connection], source: Source, slots: list[_Arrays], first: int) -> None:
    """Main loop of a worker process: indices in, broken samples out, until the pipe closes."""
    for other in inherited:
        other.close()  # otherwise this copy keeps the pipe open after the trainer is killed
    # Ctrl-C reaches every process of a terminal, and signals from torchrun and Slurm every process of a group. Workers
    # ignore them: they exit when the trainer does, because that closes the pipe.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    known_broken: dict[int, Broken] = {}
    try:
        while True:
            slot, indices = end.recv()
            try:
                reply = slots[slot].fill(source, first, indices, known_broken)
            except UserError as error:
                reply = error
            except Exception:
                reply = RuntimeError(f"in a data worker process:\n{traceback.format_exc()}")
            end.send(reply)
    except (EOFError, OSError):
        return


def _end(processes: list, ends: list[Connection]) -> None:
    for process, end in zip(processes, ends, strict=True):
        process.kill()
        process.join()
        end.close()
