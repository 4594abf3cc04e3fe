"""Check every byte of a shard set against its manifest: `unite-fast shards verify`."""

import hashlib
import re
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
    read_label,
    read_manifest,
)
from unite_fast.errors import UserError
from unite_fast.utils.files import open_regular
from unite_fast.utils.progress import progress


def verify_shards(folder: Path, workers: int) -> list[str]:
    """The faults of a shard set, one line each; empty if every byte is as written, but for what `unchecked` names.

    Raises:
        UserError: no manifest.
    """
    manifest = read_manifest(folder / MANIFEST)
    done = 0
    counts: Counter[int] = Counter()
    faults = []
    with ThreadPoolExecutor(max(1, workers)) as pool, progress("verify", manifest.samples, "images") as show:
        results = pool.map(lambda shard: _verify_shard(folder, shard, len(manifest.classes)), manifest.shards)
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


def unchecked(folder: Path) -> list[str]:
    """What no hash covers, in sets that earlier versions made."""
    manifest = read_manifest(folder / MANIFEST)
    lines = [] if manifest.checked else [f"{MANIFEST}: it has no hash of its own, which class names would need"]
    if not all(shard.index_sha256 for shard in manifest.shards):
        lines.append("the indices: compared with the shards, but there is no hash of them")
    return lines


def _verify_shard(folder: Path, shard: Shard, classes: int) -> tuple[list[str], Counter[int]]:
    """The faults of a shard, and its number of samples by label."""
    path = folder / shard.name
    counts: Counter[int] = Counter()
    try:
        with open_regular(path) as file:
            digest = hashlib.sha256()
            while chunk := file.read(2**20):
                digest.update(chunk)
            if file.tell() != shard.bytes:
                return [f"{shard.name} has {file.tell()} bytes, the manifest says {shard.bytes}"], counts
            if digest.hexdigest() != shard.sha256:
                return [f"{shard.name} has the hash {digest.hexdigest()}, the manifest says {shard.sha256}"], counts
            index = read_index(index_path(path), shard)
            if index_path(path).read_text() != scan(path).text():
                return [f"{index_path(path).name} does not match the samples in {shard.name}"], counts
            for key, (offset, size) in zip(index.keys.tolist(), index.labels.tolist(), strict=True):
                file.seek(offset)
                label = read_label(file.read(size), classes)
                if label is None:
                    return [f"{shard.name}: the label of {key:012d} is none of the {classes} classes"], counts
                counts[label] += 1
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
                if not re.fullmatch("[0-9]{12}", key):
                    raise ValueError(f"{member.name!r} is no name of a sample")
                keys.append(int(key))
                labels.append(place)
            elif extension in IMAGE_EXTENSIONS and keys and key == f"{keys[-1]:012d}":
                images.append(place)
                extensions.append(extension)
            else:
                raise ValueError(f"{member.name!r} belongs to no sample")
    label_places, image_places = (np.array(places, np.int64).reshape(-1, 2) for places in (labels, images))
    return Index(np.array(keys), label_places, image_places, extensions)
