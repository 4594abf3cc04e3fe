"""The order of a run's samples."""

import functools
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from unite_fast.data_pipeline.readers import Batch, OpenReader, Reader, check_share, open_reader
from unite_fast.data_pipeline.source import Source
from unite_fast.errors import UserError

_log = logging.getLogger("unite_fast.data")


class Loader:
    """An endless iterator over batches, in an order that depends on nothing but the seed.

    Epoch e is `source.order(seed, e)`. All epochs one after another make a stream, and batch k is samples
    k * batch_size to (k + 1) * batch_size of it. So an epoch's last batch is filled up with the next epoch's first
    samples, every sample appears exactly once an epoch, and a run is resumed by starting at its batch k.

    A rank reads its places of each global batch, whatever reads them: all ranks have the same number of batches, and
    put together they have the batches of one.

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
        reader: OpenReader = open_reader,
    ):
        """
        Args:
            source: what to read.
            batch_size: samples of the global batch, all ranks together; may exceed the source.
            seed: the run's seed, in [0, 2**64).
            workers: threads or processes, as the source wants, that read ahead; 0 reads on the caller's thread, as
                does any source in memory.
            start: number of the first batch.
            rank: this rank reads places rank * b / world to (rank + 1) * b / world of each global batch.
            world: number of ranks, a divisor of `batch_size`.
            reader: what reads and decodes.

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
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: source.order(seed, epoch))
        self._next = start
        self._begun = start
        self._closed = False
        self._open = functools.partial(reader, source, share, workers)
        self._reader: Reader | None = None

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
            UserError: all samples are broken, or more than 10 % and at least 10; a worker was killed. The loader is
                then closed.
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
            self._reader.begin(self.batch_indices(self._begun)[self._places].tolist())
            self._begun += 1
        return self._reader.take()

    def _record(self, name: str, reason: str) -> None:
        if name not in self.skipped:
            self.skipped[name] = reason
            _log.warning("skipped %s: %s", name, reason)
            check_share(len(self.skipped), len(self.source), (name, reason))

    def state_dict(self) -> dict:
        """Where the stream stands: the number of the batch that comes next, and the broken samples met so far."""
        return {"batch": self._next, "skipped": [list(item) for item in self.skipped.items()]}

    def load_state_dict(self, state: dict) -> None:
        """Go on where the loader that gave `state` stood, in this or another number of ranks."""
        self._stop_reading()
        self._next = self._begun = state["batch"]
        self.skipped = dict(state["skipped"])

    def close(self) -> None:
        """Stop reading ahead. A closed loader gives no more batches."""
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
