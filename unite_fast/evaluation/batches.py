"""Numbered batches of images from a source, prefetched by threads."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from unite_fast.checkpoint.format import places_of
from unite_fast.config import Config
from unite_fast.data_pipeline import Source, UnreadableSample, detect_source, open_held_out, open_source
from unite_fast.data_pipeline.shards.remote import is_remote
from unite_fast.data_pipeline.splits import is_held_out, split_of_name
from unite_fast.errors import UserError, require, shown

MAX_NAMED = 5
"""Unreadable samples that a result lists by name and reason; the others are only counted."""


HELD_OUT, TRAINING, GIVEN = "held-out images", "training images", "given images"
"""What images are that a model reconstructs. Given images are of data that have no splits and are not known to be those
of the training: nobody can tell whether the model was trained on them."""


def open_held_out_images(config: Config, data: str) -> tuple[Source, str]:
    """Open the held-out images of `data`, or if empty of the training data, at the model's size.

    Returns:
        The source, and what its images are: `HELD_OUT`, `TRAINING` or `GIVEN`.

    Raises:
        UserError: the data cannot be opened, or lack this split.
    """
    size, classes = config.model.image_size, config.model.num_classes
    if data:
        source, held_out = open_held_out(*detect_source(data), size, classes)
    else:
        check_named(config)
        source, held_out = open_held_out(config.data.source, config.data.path, size, classes)
    return source, HELD_OUT if held_out else _kind_without_splits(config, data)


def kind_of_training(config: Config, data: str, source: Source) -> str:
    """What the images of the training split of `data` are: see `open_held_out_images`."""
    return TRAINING if source.split else _kind_without_splits(config, data)


def _kind_without_splits(config: Config, data: str) -> str:
    recorded = config.data.path or places_of(config).get("data.path", "")
    if not data or data == recorded or Path(data).resolve() == Path(recorded).absolute():
        return TRAINING
    return HELD_OUT if is_held_out(split_of_name(Path(data).name)) else GIVEN


def check_classes(source: Source, names: Sequence[str]) -> None:
    """Check that the classes of data are those of the model, where labels are used.

    Args:
        names: of the model's classes; not compared if they are not known, or if only one of the two has names and the
            other has numbers.

    Raises:
        UserError: a label means another class.
    """
    if not names or all(map(str.isdecimal, names)) != all(map(str.isdecimal, source.class_names)):
        return
    for label, (here, known) in enumerate(zip_longest(source.class_names, names)):
        require(
            here == known,
            f"class {label} of the data is {shown(here)}, and the model was trained with {shown(known)}: give data "
            "with the classes of its training",
        )


def check_named(config: Config) -> None:
    """
    Raises:
        UserError: the settings of the model name a path, which is not used unless the user gives it.
    """
    if not config.data.path and (named := places_of(config).get("data.path")):
        use = "what it runs or fetches is never used unasked" if is_remote(named) else f"say --data {named!r} to use it"
        raise UserError(f"the model's settings name {named!r} as its data: {use}")


def open_images(config: Config, data: str, split: str) -> Source:
    """Open images of a split at the model's size: from `data` (any kind), or if empty from the training data.

    Raises:
        UserError: the data cannot be opened.
    """
    size = config.model.image_size
    if data:
        return open_source(*detect_source(data), size, split)
    check_named(config)
    return open_source(config.data.source, config.data.path, size, split, config.model.num_classes)


@dataclass(frozen=True)
class NumberedBatch:
    indices: Tensor
    """int64 [b], indices of the samples in the source or in the generated series."""
    images: Tensor
    """uint8 [b, 3, S, S]."""
    labels: Tensor
    """int64 [b]."""
    unreadable: tuple[str, ...] = ()
    """Name and reason of each sample that could not be read and was left out."""


def read_batches(source: Source, batches: Iterable[Sequence[int]], workers: int = 2) -> Iterator[NumberedBatch]:
    """Read the samples of each batch of indices, in order. Unreadable samples are left out; a batch may be empty."""
    if source.workers == "none" or workers == 0:
        yield from (_read(source, batch) for batch in batches)
        return
    # Decoding releases the GIL, so threads suffice; the window limits the batches in memory.
    with ThreadPoolExecutor(workers) as pool:
        window: deque = deque()
        for batch in batches:
            window.append(pool.submit(_read, source, batch))
            if len(window) > 2 * workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()


def unreadable_info(unreadable: list[str]) -> dict:
    """JSON entries of a result: the number of unreadable samples, and the first few in sorted order.

    Args:
        unreadable: see `NumberedBatch`, gathered over the ranks.
    """
    return {"unreadable": len(unreadable), "unreadable_first": sorted(unreadable)[:MAX_NAMED]}


def unreadable_lines(result: Mapping, title: str) -> list[str]:
    """A line for the terminal if samples were left out.

    Args:
        result: holds the entries of `unreadable_info`; files of other programs or older versions may lack them.
        title: what the samples are: "images of the reference".
    """
    if not result.get("unreadable"):
        return []
    names = result.get("unreadable_first")
    # From a file of statistics they may be anything.
    first = f", first: {repr(str(names[0]))[1:-1]}" if isinstance(names, list) and names else ""
    return [f"{result['unreadable']} {title} could not be read and were left out{first}"]


def _read(source: Source, batch: Sequence[int]) -> NumberedBatch:
    try:
        images, labels = source.read(batch)
        return NumberedBatch(torch.tensor(batch), images, labels)
    except UnreadableSample:
        pass
    indices, images, labels, unreadable = [], [], [], []
    for index in batch:
        try:
            image, label = source.read([index])
        except UnreadableSample as error:
            unreadable.append(str(error))
            continue
        indices.append(index)
        images.append(image)
        labels.append(label)
    size = source.image_size
    empty = torch.empty(0, 3, size, size, dtype=torch.uint8)
    return NumberedBatch(
        torch.tensor(indices, dtype=torch.int64),
        torch.cat([empty, *images]),
        torch.cat([torch.empty(0, dtype=torch.int64), *labels]),
        tuple(unreadable),
    )
