"""How fast this host writes and reads the run folder, and how fast its processes load training data."""

import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

import torch

from unite_fast.config import Config
from unite_fast.data_pipeline import Loader, choose_loader
from unite_fast.distributed.process_group import Ranks
from unite_fast.distributed.strategy import split_batch
from unite_fast.training.setup import open_training_data

FILE_BYTES = 64 * 2**20
CHUNK = 4 * 2**20
LONGEST = 3.0
"""Seconds after which a slow disk gets no more to write, or to read."""
LOADER_SECONDS = 2.0
MOST_IMAGES = 64
"""Per batch and process, so that a batch is short whatever the recipe's."""


def disk_rates(folder: Path) -> dict[str, float]:
    """Write a file of up to 64 MB, sync it, read it back, delete it.

    Returns:
        `write` and `read`, bytes/s. The file system is asked to forget the file before it is read, which it may ignore.

    Raises:
        OSError: the folder is missing, cannot be written, or is full.
    """
    path = folder / f".unite_fast-check-{secrets.token_hex(8)}"
    chunk = os.urandom(CHUNK)  # what cannot be compressed
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        path.unlink()  # so that nothing stays, even of a killed process
        begun, size = time.perf_counter(), 0
        while size < FILE_BYTES and time.perf_counter() - begun < LONGEST:
            size += os.write(descriptor, chunk)
        os.fsync(descriptor)
        write = size / (time.perf_counter() - begun)
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        begun, size = time.perf_counter(), 0
        while time.perf_counter() - begun < LONGEST and (piece := os.pread(descriptor, CHUNK, size)):
            size += len(piece)
        return {"write": write, "read": size / (time.perf_counter() - begun)}
    finally:
        os.close(descriptor)


def loader_rate(config: Config, ranks: Ranks, device: torch.device, seconds: float) -> dict:
    """Read training data as a run would, from its first batch on.

    Returns:
        `rate` (this rank's images/s, without the first batch, which starts the workers), `images` and `classes` of the
        data, `loader`, and `opened` (s).

    Raises:
        UserError: the data cannot be opened or read, or the batch cannot be split over the ranks.
    """
    begun = time.perf_counter()
    source = open_training_data(config)
    own, _ = split_batch(ranks, config.train.batch_size, config.train.micro_batch)
    share = min(own.stop - own.start, MOST_IMAGES)
    choice = choose_loader(config.data.loader, source, device)
    opened = time.perf_counter() - begun
    with Loader(
        source, share * ranks.world, config.seed, config.data.workers, 0, ranks.rank, ranks.world, choice.reader
    ) as loader:
        next(loader)
        count, begun = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begun) < seconds or not count:
            next(loader)
            count += share
    return {
        "rate": count / elapsed,
        "images": len(source),
        "classes": len(source.class_names),
        "loader": choice.name,
        "opened": opened,
    }
