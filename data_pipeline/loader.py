"""The loader: batches of a source, in an order that depends only on the seed."""

import functools
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from unite_fast.data_pipeline.readers import Batch, OpenReader, Reader, check_broken_fraction, open_reader
from unite_fast.data_pipeline.source import Source
from unite_fast.errors import UserError

_log = logging.getLogger("unite_fast.data")


class Loader:
    """An endless iterator over batches.

    Epoch e is `source.order(seed, e)`. The epochs are concatenated to one stream, and batch k is samples
    k * batch_size to (k + 1) * batch_size of it. So every sample appears exactly once per epoch, the last batch of an
    epoch is filled up from the next one, and a run resumes by starting at batch k.

    Each rank reads its slice of every global batch. All ranks have the same number of batches, and together they read
    what a single process would.

    A broken sample is replaced by the next readable one in the source. It is added to `skipped` and reported by the
    logger "unite_fast.data", both once. The random flip is not done here but in the train step.

    Attributes:
        skipped: name -> reason of the broken samples that this rank found so far, in the order of the stream.
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
        reader: OpenReader = open_reader,
    ):
        """
        Args:
            source: the data.
            batch_size: samples in the global batch of all ranks; may exceed the length of the source.
            seed: the run's seed, in [0, 2**64).
            workers: number of threads or processes (see `Source.workers`) that prefetch; 0 reads on the caller's
                thread, and so does every source in memory.
            start: number of the first batch.
            rank: this rank reads positions rank * b / world to (rank + 1) * b / world of each global batch.
            world: number of ranks, a divisor of `batch_size`.
            reader: opens the reader, see `choose_loader`.

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
        per_rank = batch_size // world
        self._slice = slice(rank * per_rank, (rank + 1) * per_rank)
        # Two, because a batch may span two epochs.
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: source.order(seed, epoch))
        self._next = start
        self._begun = start
        self._closed = False
        self._open = functools.partial(reader, source, per_rank, workers)
        self._reader: Reader | None = None

    def batch_indices(self, k: int) -> Tensor:
        """The samples of global batch `k`, int64 [batch_size], before broken ones are replaced."""
        pieces = []
        position, end = k * self.batch_size, (k + 1) * self.batch_size
        while position < end:
            epoch, offset = divmod(position, len(self.source))
            pieces.append(self._order(epoch)[offset : offset + end - position])
            position += len(pieces[-1])
        return torch.cat(pieces)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            UserError: too many samples are broken (all, or more than 10 % and at least 10), or a worker was killed.
                The loader is then closed.
        """
        if self._closed:
            raise RuntimeError("the loader is closed")
        try:
            batch, broken = self._take()
            for name, reason in broken:
                self._record(name, reason)
        except BaseException:
            self.close()
            raise
        self._next += 1
        return batch

    def _take(self) -> tuple[Batch, list[tuple[str, str]]]:
        if self._reader is None:
            self._reader = self._open()
        while self._begun <= self._next + self._reader.ahead:
            self._reader.begin(self.batch_indices(self._begun)[self._slice].tolist())
            self._begun += 1
        return self._reader.take()

    def _record(self, name: str, reason: str) -> None:
        if name not in self.skipped:
            self.skipped[name] = reason
            _log.warning("skipped %s: %s", name, reason)
            check_broken_fraction(len(self.skipped), len(self.source), (name, reason))

    def state_dict(self) -> dict:
        """The number of the next batch, and the broken samples found so far."""
        return {"batch": self._next, "skipped": [list(item) for item in self.skipped.items()]}

    def load_state_dict(self, state: dict) -> None:
        """Resume from `state`, which a loader on any number of ranks saved."""
        self._stop_reading()
        self._next = self._begun = state["batch"]
        self.skipped = dict(state["skipped"])

    def close(self) -> None:
        """Stop the workers. A closed loader returns no more batches."""
        self._closed = True
        self._stop_reading()

    def _stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_):
        self.close()
