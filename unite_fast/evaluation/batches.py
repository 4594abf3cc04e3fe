"""Images of a source in numbered batches, each process its own ones, read ahead by threads."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from unite_fast.config import Config
from unite_fast.data_pipeline import Source, UnreadableSample, detect_source, open_source

NAMED = 5
"""Of how many samples that cannot be read a result keeps name and reason; the others are only counted."""


def open_named(config: Config, data: str, split: str) -> Source:
    """Images of the model's size: of the data that were named, of whatever kind they are, or of those trained on.

    Raises:
        UserError: whatever is wrong with the data.
    """
    size = config.model.image_size
    if data:
        return open_source(*detect_source(data), size, split)
    return open_source(config.data.source, config.data.path, size, split, config.model.num_classes)


@dataclass(frozen=True)
class NumberedBatch:
    indices: Tensor
    """int64 [b], the samples' indices in the source or in the series that is generated."""
    images: Tensor
    """uint8 [b, 3, S, S]."""
    labels: Tensor
    """int64 [b]."""
    broken: tuple[str, ...] = ()
    """Name and reason of each sample that could not be read and is left out."""


def read_batches(source: Source, batches: Iterable[Sequence[int]], workers: int = 2) -> Iterator[NumberedBatch]:
    """The samples of each batch of numbers, in order, without the broken ones; a batch may be empty."""
    if source.workers == "none" or workers == 0:
        yield from (_read(source, batch) for batch in batches)
        return
    # Decoding leaves the interpreter free, so threads do; and a window keeps the batches in memory few.
    with ThreadPoolExecutor(workers) as pool:
        window: deque = deque()
        for batch in batches:
            window.append(pool.submit(_read, source, batch))
            if len(window) > 2 * workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()


def unreadable(broken: list[str]) -> dict:
    """For the JSON of a result: how many samples were left out, and name and reason of the first, whatever order they
    came in.

    Args:
        broken: see `NumberedBatch`, those of all processes.
    """
    return {"unreadable": len(broken), "unreadable_first": sorted(broken)[:NAMED]}


def unreadable_lines(result: Mapping, what: str) -> list[str]:
    """For a terminal: a line if samples were left out. Statistics of others, or of an earlier version, may lack names
    or count.

    Args:
        result: holds what `unreadable` gives.
        what: what the samples are: "images of the reference".
    """
    if not result.get("unreadable"):
        return []
    names = result.get("unreadable_first")
    first = f", the first: {names[0]}" if names else ""
    return [f"{result['unreadable']} {what} could not be read and are left out{first}"]


def _read(source: Source, batch: Sequence[int]) -> NumberedBatch:
    try:
        images, labels = source.read(batch)
        return NumberedBatch(torch.tensor(batch), images, labels)
    except UnreadableSample:
        pass
    indices, images, labels, broken = [], [], [], []
    for number in batch:
        try:
            image, label = source.read([number])
        except UnreadableSample as error:
            broken.append(str(error))
            continue
        indices.append(number)
        images.append(image)
        labels.append(label)
    size = source.image_size
    none = torch.empty(0, 3, size, size, dtype=torch.uint8)
    return NumberedBatch(
        torch.tensor(indices, dtype=torch.int64),
        torch.cat([none, *images]),
        torch.cat([torch.empty(0, dtype=torch.int64), *labels]),
        tuple(broken),
    )
