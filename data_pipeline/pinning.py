"""Copy batches into pinned memory on a background thread, so that the copy to the GPU is asynchronous."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from unite_fast.data_pipeline.readers import Batch, Broken, OpenReader, Reader
from unite_fast.data_pipeline.source import Source


def pinned(open_inner: OpenReader, device: torch.device) -> OpenReader:
    """Like `open_inner`, with batches in pinned memory for the CUDA device `device`: a copy from pageable memory would
    wait for the work queued on the device."""

    def pin(batch: Batch) -> Batch:
        # Pinning creates a context on the thread's current device, so set the right one.
        with torch.cuda.device(device):
            return replace(batch, data=batch.data.pin_memory(), labels=batch.labels.pin_memory())

    def open_pinned(source: Source, b: int, workers: int) -> Reader:
        return PinnedReader(open_inner(source, b, workers), pin)

    return open_pinned


class PinnedReader:
    """Prefetches and pins the inner reader's batches on one thread. Only that thread calls the inner reader, except for
    `close`, so the inner reader need not be thread-safe."""

    def __init__(self, inner: Reader, pin: Callable[[Batch], Batch]):
        self.inner, self.pin = inner, pin
        self.ahead = max(1, inner.ahead)
        self.queued: deque[list[int]] = deque()
        """Indices of batches that the inner reader has not begun."""
        self.begun = 0
        """Batches that it has begun and not returned."""
        self.batches: deque[Future] = deque()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="unite_fast-pin")

    def begin(self, indices: list[int]) -> None:
        self.queued.append(indices)
        self.batches.append(self.thread.submit(self._next))

    def _next(self) -> tuple[Batch, list[Broken]]:
        while self.queued and self.begun <= self.inner.ahead:
            self.inner.begin(self.queued.popleft())
            self.begun += 1
        batch, broken = self.inner.take()
        self.begun -= 1
        return self.pin(batch), broken

    def take(self) -> tuple[Batch, list[Broken]]:
        return self.batches.popleft().result()

    def close(self) -> None:
        # Close the inner reader while the thread may wait for it: that ends the wait, and nobody reads an error then.
        self.thread.shutdown(wait=False, cancel_futures=True)
        self.inner.close()
        self.thread.shutdown(wait=True)
