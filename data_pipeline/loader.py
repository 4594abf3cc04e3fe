"""The order of a run's samples, and their reading ahead of need."""

import functools
import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from unite_fast.data_pipeline.source import Source, UnreadableSample
from unite_fast.errors import UserError
from unite_fast.randomness import permutation

_log = logging.getLogger("unite_fast.data")

_BATCHES_AHEAD = 2
# Beyond both, the data is at fault, not a few files of it.
_BAD_FRACTION, _BAD_COUNT = 0.1, 10


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        images: uint8 [b, 3, image_size, image_size].
        labels: int64 [b].
        ids: int64 [b], the samples' numbers in the source.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor


class Loader:
    """An endless iterator over batches, in an order that depends on nothing but the seed.

    Epoch e is `permutation(seed, e, len(source))`. All epochs one after another make a stream, and batch k is samples
    k * batch_size to (k + 1) * batch_size of it. So an epoch's last batch is filled up with the next epoch's first
    samples, every sample appears exactly once an epoch, and a run is resumed by starting at its batch k.

    A broken sample is replaced by the next one in the source that can be read, entered in `skipped` once, and
    reported once, as a warning of the logger "unite_fast.data". Pixels are not changed: the random flip is the
    trainer's.

    Attributes:
        skipped: name -> reason of the broken samples met so far by this rank, in the order of the stream.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        workers: int = 0,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        """
        Args:
            source: what to read.
            batch_size: samples of the global batch, all ranks together; may exceed the source.
            seed: the run's seed, in [0, 2**64).
            workers: threads that read ahead, up to two batches; 0 reads on the caller's thread, as does any source in
                memory.
            start: number of the first batch.
            rank: this rank reads places rank * b / world to (rank + 1) * b / world of each global batch.
            world: number of ranks, a divisor of `batch_size`.

        Raises:
            UserError: `batch_size` is not a positive multiple of `world`, or `workers` is negative.
        """
        if batch_size < 1 or batch_size % world:
            raise UserError(
                f"the batch size {batch_size} must be a positive multiple of the number of processes, {world}"
            )
        if workers < 0:
            raise UserError(f"data.workers is {workers}: it must be 0 or more")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not in [0, {world})")
        self.source = source
        self.batch_size = batch_size
        self.skipped: dict[str, str] = {}
        share = batch_size // world
        self._places = slice(rank * share, (rank + 1) * share)
        # Two, because a batch may lie across two epochs.
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: permutation(seed, epoch, len(source)))
        self._bad: dict[int, tuple[str, str]] = {}
        self._next = start
        self._ahead: deque[tuple[Batch, Iterator]] = deque()
        self._closed = False
        self._pool = None
        if workers and not source.in_memory:
            self._pool = ThreadPoolExecutor(workers, thread_name_prefix="unite_fast-read")

    def batch_indices(self, k: int) -> Tensor:
        """The samples of global batch `k`, int64 [batch_size], before any broken one is replaced."""
        pieces = []
        place, end = k * self.batch_size, (k + 1) * self.batch_size
        while place < end:
            epoch, offset = divmod(place, len(self.source))
            pieces.append(self._order(epoch)[offset : offset + end - place])
            place += len(pieces[-1])
        return torch.cat(pieces)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            UserError: all samples are broken, or more than 10 % and at least 10. The loader is then closed.
        """
        if self._closed:
            raise RuntimeError("the loader is closed")
        try:
            batch = self._take_in_memory() if self.source.in_memory else self._take_read_ahead()
        except BaseException:
            self.close()
            raise
        self._next += 1
        return batch

    def state_dict(self) -> dict:
        """Where the stream stands: the number of the batch that comes next, and the broken samples met so far."""
        return {"batch": self._next, "skipped": [list(item) for item in self.skipped.items()]}

    def load_state_dict(self, state: dict):
        """Go on where the loader that gave `state` stood, in this or another number of ranks."""
        self._next = state["batch"]
        self.skipped = dict(state["skipped"])
        self._ahead.clear()

    def close(self):
        """Stop reading ahead; waits for the reads under way, one a worker. A closed loader gives no more batches."""
        self._closed = True
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_):
        self.close()

    def _take_in_memory(self) -> Batch:
        ids = self.batch_indices(self._next)[self._places]
        images, labels = self.source.read(ids)
        return Batch(images, labels, ids)

    def _take_read_ahead(self) -> Batch:
        batches = 1 + (_BATCHES_AHEAD if self._pool else 0)
        while len(self._ahead) < batches:
            self._ahead.append(self._begin(self._next + len(self._ahead)))
        batch, samples = self._ahead.popleft()
        for bad in samples:
            self._record(bad)
        return batch

    def _begin(self, k: int) -> tuple[Batch, Iterator[list[tuple[str, str]]]]:
        """A batch to be filled, and what `_read_sample` returns of each of its samples.

        The batch is full once the iterator is used up: the pool is at work from now on, without a pool each sample is
        read as the iterator gets to it.
        """
        wanted = self.batch_indices(k)[self._places]
        b, size = len(wanted), self.source.image_size
        images = torch.empty(b, 3, size, size, dtype=torch.uint8)
        batch = Batch(images, torch.empty(b, dtype=torch.int64), torch.empty(b, dtype=torch.int64))
        run = self._pool.map if self._pool else map
        return batch, run(functools.partial(self._read_sample, batch), range(b), wanted.tolist())

    def _read_sample(self, batch: Batch, place: int, index: int) -> list[tuple[str, str]]:
        """Fill one place of a batch with sample `index`, or the next that reads; returns name and reason of the others.

        On a worker's thread: what it finds is recorded by the consumer, in the order of the stream, so that a run is
        the same with any number of workers.
        """
        bad = []
        while True:
            if index not in self._bad:
                try:
                    images, labels = self.source.read([index])
                    # A numpy copy: each thread that copies with torch starts a pool of threads of its own.
                    batch.images[place].numpy()[:] = images[0].numpy()
                    batch.labels[place], batch.ids[place] = labels[0], index
                    return bad
                except UnreadableSample as error:
                    # Not the exception itself: its traceback would keep the batch alive.
                    self._bad[index] = (error.name, error.reason)
            bad.append(self._bad[index])
            self._check_share(len(bad), bad[-1])
            index = (index + 1) % len(self.source)

    def _record(self, bad: list[tuple[str, str]]):
        for name, reason in bad:
            if name not in self.skipped:
                self.skipped[name] = reason
                _log.warning("skipped %s: %s", name, reason)
                self._check_share(len(self.skipped), (name, reason))

    def _check_share(self, count: int, last: tuple[str, str]):
        n = len(self.source)
        if count >= n or (count >= _BAD_COUNT and count > _BAD_FRACTION * n):
            name, reason = last
            raise UserError(f"{count} of {n} samples cannot be read, the last one {name} ({reason}): mend or remove")
