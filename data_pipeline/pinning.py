"""Batches moved into pinned memory by a thread of its own, so that the trainer's only asks the GPU to fetch them."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from unite_fast.data_pipeline.readers import Bad, Batch, OpenReader, Reader
from unite_fast.data_pipeline.source import Source

Pin = Callable[[Batch], Batch]


def pinned(open_inner: OpenReader, device: torch.device) -> OpenReader:
    """A reader like the inner one, whose batches lie in pinned memory: from other memory, a copy to the CUDA device
    `device` would wait for what that has yet to do."""

    def pin(batch: Batch) -> Batch:
        # Each thread has a current device, and memory is pinned by way of it: another one would get a context.
        with torch.cuda.device(device):
            return replace(batch, images=batch.images.pin_memory(), labels=batch.labels.pin_memory())

    def open_pinned(source: Source, b: int, workers: int) -> Reader:
        return PinnedReader(open_inner(source, b, workers), pin)

    return open_pinned


class PinnedReader:
    """Takes the inner reader's batches ahead of need, on one thread, and pins them. That thread alone uses the inner
    reader, of which no call need be safe beside another, but for `close`."""

    def __init__(self, inner: Reader, pin: Pin):
        self.inner, self.pin = inner, pin
        self.ahead = max(1, inner.ahead)
        self.wanted: deque[list[int]] = deque()
        """Batches that the inner reader has yet to begin."""
        self.begun = 0
        """Batches that it has begun and not given."""
        self.batches: deque[Future] = deque()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="unite_fast-pin")

    def begin(self, wanted: list[int]) -> None:
        self.wanted.append(wanted)
        self.batches.append(self.thread.submit(self._next))

    def _next(self) -> tuple[Batch, list[Bad]]:
        while self.wanted and self.begun <= self.inner.ahead:
            self.inner.begin(self.wanted.popleft())
            self.begun += 1
        batch, bad = self.inner.take()
        self.begun -= 1
        return self.pin(batch), bad

    def take(self) -> tuple[Batch, list[Bad]]:
        return self.batches.popleft().result()

    def close(self) -> None:
        # The inner reader is closed under the thread: whatever it waits for ends, well or with an error for nobody.
        self.thread.shutdown(wait=False, cancel_futures=True)
        self.inner.close()
        self.thread.shutdown(wait=True)
