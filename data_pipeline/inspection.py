"""A look at data before a run: `unite-fast inspect`."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from unite_fast.data_pipeline import dali
from unite_fast.data_pipeline.choose_loader import choose_loader, fitting_loaders
from unite_fast.data_pipeline.loader import Loader
from unite_fast.data_pipeline.open_source import open_data
from unite_fast.data_pipeline.shards.source import ShardSource
from unite_fast.data_pipeline.source import Source, read_readable
from unite_fast.utils.files import writing
from unite_fast.utils.images import grid

_ROWS, _COLUMNS = 8, 8
_CLASSES_NAMED = 10
_BATCH = 64


def inspect_data(
    path: str, image_size: int, split: str, workers: int, seconds: float, seed: int, out: Path
) -> Iterator[str]:
    """Lines that say what is there and how fast it can be read; a grid of the first images of a run goes to `out`.

    Raises:
        UserError: whatever is wrong with the data.
    """
    kind, source = open_data(path, image_size, split)
    size = source.image_size
    yield f"{kind}: {len(source)} images of {size} x {size} pixels, {len(source.class_names)} classes"
    yield from _describe_classes(source)
    order = source.order(seed, 0).tolist()
    images = read_readable(source, order, most=_ROWS * _COLUMNS)[0]
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        grid(images, _COLUMNS).save(out)
    yield f"grid: the first {len(images)} images of a run with seed {seed}, as the model sees them, in {out}"
    for name in fitting_loaders(source):
        if name == "dali" and (reason := dali.missing()):
            yield f"loader dali: {reason}"
            continue
        yield f"loader {name}: {_throughput(source, name, workers, seconds)}"
    choice = choose_loader("auto", source, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    yield f"data.loader=auto takes {choice.name}: {choice.why}"


def _describe_classes(source: Source) -> Iterator[str]:
    if isinstance(source, ShardSource):
        manifest = source.manifest
        total = sum(shard.bytes for shard in manifest.shards) / 1e9
        yield (
            f"{len(manifest.shards)} shards of format {manifest.format} (crop: {manifest.crop}), {total:.2f} GB, seed "
            f"{manifest.seed}, {manifest.skipped} broken images left out"
        )
    counts = source.class_counts()
    pairs = list(zip(source.class_names, counts, strict=True))
    named = ", ".join(f"{name} ({count})" for name, count in pairs[:_CLASSES_NAMED])
    more = f", and {len(pairs) - _CLASSES_NAMED} more" if len(pairs) > _CLASSES_NAMED else ""
    yield f"classes: {named}{more}; {min(counts)} to {max(counts)} images each"


def _throughput(source: Source, name: str, workers: int, seconds: float) -> str:
    """Images a second of a loader that starts at the first batch of a run, without its start."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choice = choose_loader(name, source, device)
    with Loader(source, min(_BATCH, len(source)), 0, workers, reader=choice.reader) as loader:
        next(loader)
        count, begun = 0, time.perf_counter()
        while (passed := time.perf_counter() - begun) < seconds:
            count += len(next(loader).labels)
        skipped = f", {len(loader.skipped)} broken" if loader.skipped else ""
    return f"{count / passed:.0f} images/s with {workers} workers{skipped}"
