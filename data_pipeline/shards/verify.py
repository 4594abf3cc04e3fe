"""Check every byte of a shard set against its manifest: `unite-fast shards verify`."""

import hashlib
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from unite_fast.data_pipeline.shards.manifest import (
    IMAGE_EXTENSIONS,
    MANIFEST,
    Index,
    Shard,
    index_path,
    read_index,
    read_manifest,
)
from unite_fast.errors import UserError
from unite_fast.utils.progress import progress


def verify_shards(folder: Path, workers: int) -> list[str]:
    """The faults of a shard set, one line each; empty if every byte is as written.

    Raises:
        UserError: no manifest.
    """
    manifest = read_manifest(folder / MANIFEST)
    done = 0
    counts: Counter[int] = Counter()
    faults = []
    with ThreadPoolExecutor(max(1, workers)) as pool, progress("verify", manifest.samples, "images") as show:
        results = pool.map(lambda shard: _verify_shard(folder, shard), manifest.shards)
        for shard, (shard_faults, shard_counts) in zip(manifest.shards, results, strict=True):
            faults += shard_faults
            counts += shard_counts
            done += shard.samples
            show(done)
    if not faults:
        for label, (name, count) in enumerate(manifest.classes.items()):
            if counts[label] != count:
                faults.append(f"class {name} has {counts[label]} images, the manifest says {count}")
    return faults


def _verify_shard(folder: Path, shard: Shard) -> tuple[list[str], Counter[int]]:
    """The faults of a shard, and its number of samples by label."""
    path = folder / shard.name
    counts: Counter[int] = Counter()
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(2**20):
                digest.update(chunk)
            if file.tell() != shard.bytes:
                return [f"{shard.name} has {file.tell()} bytes, the manifest says {shard.bytes}"], counts
            if digest.hexdigest() != shard.sha256:
                return [f"{shard.name} has the hash {digest.hexdigest()}, the manifest says {shard.sha256}"], counts
            index = read_index(index_path(path))
            if index.text() != scan(path).text():
                return [f"{index_path(path).name} does not match the samples in {shard.name}"], counts
            if len(index.keys) != shard.samples:
                return [f"{shard.name} has {len(index.keys)} samples, the manifest says {shard.samples}"], counts
            for offset, size in index.labels.tolist():
                file.seek(offset)
                counts[int(file.read(size))] += 1
    except (OSError, tarfile.TarError, ValueError, UserError) as error:
        return [f"{shard.name}: {error}"], counts
    return [], counts


def scan(path: Path) -> Index:
    """Make the index of a shard from its tar file."""
    keys, labels, images, extensions = [], [], [], []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            place = (member.offset_data, member.size)
            if extension == "cls":
                keys.append(int(key))
                labels.append(place)
            elif extension in IMAGE_EXTENSIONS and keys and int(key) == keys[-1]:
                images.append(place)
                extensions.append(extension)
            else:
                raise ValueError(f"{member.name} belongs to no sample")
    label_places, image_places = (np.array(places, np.int64).reshape(-1, 2) for places in (labels, images))
    return Index(np.array(keys), label_places, image_places, extensions)
