"""Inspect a dataset before a run: `unite-fast inspect`."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from unite_fast.config import check_seed_and_batch
from unite_fast.data_pipeline import dali
from unite_fast.data_pipeline.choose_loader import choose_loader
from unite_fast.data_pipeline.loader import Loader
from unite_fast.data_pipeline.open_source import detect_source, open_source
from unite_fast.data_pipeline.shards.source import ShardSource
from unite_fast.data_pipeline.source import Source, read_readable
from unite_fast.data_pipeline.splits import is_held_out
from unite_fast.errors import printable
from unite_fast.utils.device import choose_device
from unite_fast.utils.files import writing
from unite_fast.utils.images import grid, save_png

_ROWS, _COLUMNS = 8, 8
_MOST_CLASSES = 10
_BATCH = 64


def inspect_data(
    data: str, image_size: int, split: str, workers: int, seconds: float, seed: int, out: Path
) -> Iterator[str]:
    """Describe a dataset and time the loaders, a line at a time; save a grid of the first images of a run to `out`.

    Raises:
        UserError: faulty data, or a seed out of range.
    """
    check_seed_and_batch(seed, batch=1, prefix="--")
    kind, path = detect_source(data)
    source = open_source(kind, path, image_size, split)
    size = source.image_size
    of_split = f" of split {printable(source.split)}" if source.split else ""
    yield f"{kind}: {len(source)} images{of_split} of {size} x {size} pixels, {len(source.class_names)} classes"
    if is_held_out(split) and source.held_out is False:
        yield "the data have no splits: these are all images, training images too"
    yield from _describe_classes(source)
    yield from map(printable, source.notes)
    for line in source.left_out:
        yield f"left out: {line}"
    order = source.order(seed, 0).tolist()
    images = read_readable(source, order, most=_ROWS * _COLUMNS)[0]
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    save_png(grid(images, _COLUMNS), out)
    yield f"grid: the first {len(images)} images of a run with seed {seed}, as the model sees them, in {out}"
    device = choose_device("auto")
    for name in source.loaders:
        if name == "dali" and (reason := dali.missing()):
            yield f"loader dali: {reason}"
            continue
        yield f"loader {name}: {_throughput(source, name, device, workers, seconds)}"
    choice = choose_loader("auto", source, device)
    yield f"data.loader=auto chooses {choice.name}: {choice.why}"


def _describe_classes(source: Source) -> Iterator[str]:
    if isinstance(source, ShardSource):
        manifest = source.manifest
        total = sum(shard.bytes for shard in manifest.shards) / 1e9
        yield (
            f"{len(manifest.shards)} shards of format {manifest.format} (crop: {manifest.crop}), {total:.2f} GB, seed "
            f"{manifest.seed}, {manifest.skipped} broken images skipped"
        )
    counts = source.class_counts()
    pairs = list(zip(source.class_names, counts, strict=True))
    listed = ", ".join(f"{printable(name)} ({count})" for name, count in pairs[:_MOST_CLASSES])
    more = f", and {len(pairs) - _MOST_CLASSES} more" if len(pairs) > _MOST_CLASSES else ""
    yield f"classes: {listed}{more}; {min(counts)} to {max(counts)} images each"


def _throughput(source: Source, name: str, device: torch.device, workers: int, seconds: float) -> str:
    """Images per second of a loader from the first batch of a run on; starting the workers is not timed."""
    choice = choose_loader(name, source, device)
    with Loader(source, min(_BATCH, len(source)), 0, workers, reader=choice.reader) as loader:
        next(loader)
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            count += len(next(loader).labels)
        skipped = f", {len(loader.skipped)} broken" if loader.skipped else ""
    return f"{count / elapsed:.0f} images/s with {workers} workers{skipped}"
