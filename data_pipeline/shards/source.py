"""Read single samples of a shard set in any order, through the shards' indices."""

import functools
import hashlib
import io
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from unite_fast.data_pipeline.image_folder import decode_image
from unite_fast.data_pipeline.shards.manifest import (
    MANIFEST,
    Index,
    Shard,
    index_path,
    read_index,
    read_label,
    read_manifest,
)
from unite_fast.data_pipeline.source import Source, UnreadableSample
from unite_fast.data_pipeline.splits import (
    WORDS,
    check_same_classes,
    choose_split,
    is_held_out,
    training_folder,
    words_of,
)
from unite_fast.errors import UserError
from unite_fast.utils.files import open_regular

_OPEN_SHARDS = 256
"""Shard files kept open; most systems allow a process 1,024 files."""


class ShardSource(Source):
    """The samples of a shard set, ordered by key.

    A sample's index therefore does not depend on the format, shard size or shuffle of the set. If no image was broken,
    it equals the index in the original folder, and a run reads the same samples in the same order.
    """

    def __init__(self, folder: Path, image_size: int):
        """
        Args:
            folder: the folder of the manifest.
            image_size: side of the images, pixels; 0 means the size of the images in the set, or 256 for the format
                original, whose images are cropped when read.

        Raises:
            UserError: a file is missing or not as long as the manifest says, or the images have another size.
        """
        self.folder = folder
        self.manifest = read_manifest(folder / MANIFEST)
        self.image_size = image_size or self.manifest.image_size or 256
        self.class_names = list(self.manifest.classes)
        if self.manifest.skipped:
            self.left_out = [f"{self.manifest.skipped} broken images when the set was made: skipped.log names them"]
        self.workers = "threads" if self.manifest.format == "raw" else "processes"
        if self.manifest.image_size not in (0, self.image_size):
            raise UserError(
                f"{folder} holds images of {self.manifest.image_size} x {self.manifest.image_size} pixels, image_size "
                f"is {image_size}: set it to {self.manifest.image_size} or make another set"
            )
        self._index_samples()
        self._open = functools.lru_cache(_OPEN_SHARDS)(self._open_shard)

    def _index_samples(self) -> None:
        """The shard and the byte ranges of label and image of each sample, ordered by key."""
        shards = self.manifest.shards
        indices = [self.checked_index(shard) for shard in shards]
        keys = np.concatenate([index.keys for index in indices])
        self._by_key = np.argsort(keys, kind="stable")
        self._keys = keys[self._by_key]
        if len(keys) > 1 and (np.diff(self._keys) == 0).any():
            raise UserError(f"{self.folder} holds a sample twice: make the set again with unite-fast shards")
        self.shard_of = np.repeat(np.arange(len(shards)), [shard.samples for shard in shards])[self._by_key]
        self._labels = np.concatenate([index.labels for index in indices])[self._by_key]
        self._images = np.concatenate([index.images for index in indices])[self._by_key]

    def checked_index(self, shard: Shard) -> Index:
        path = self.folder / shard.name
        index = read_index(index_path(path), shard)
        self.check_shard(path, shard)
        return index

    def check_shard(self, path: Path, shard: Shard) -> None:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"shard {path} is missing ({error.strerror}): restore it, or make the set again") from None
        if size != shard.bytes:
            fault = "truncated" if size < shard.bytes else "too long"
            raise UserError(
                f"shard {path} is {fault}: {size} bytes, the manifest says {shard.bytes}; "
                "restore it, or make the set again"
            )

    @property
    def loaders(self) -> tuple[str, ...]:
        return ("raw",) if self.manifest.format == "raw" else ("webdataset", "dali")

    def __len__(self) -> int:
        return len(self._keys)

    def class_counts(self) -> list[int]:
        return list(self.manifest.classes.values())

    def name(self, index: int) -> str:
        return f"{self.manifest.shards[self.shard_of[index]].name}:{self._keys[index]:012d}"

    def fingerprint(self) -> str:
        """SHA-256 of the shards' hashes: the same images in another format are other data."""
        return hashlib.sha256("\n".join(shard.sha256 for shard in self.manifest.shards).encode()).hexdigest()

    def read_into(self, index: int, image: np.ndarray) -> int:
        if self.manifest.format == "raw":
            return self._read_raw(index, image)
        data, label = self.encoded(index)
        image[:] = decode_image(io.BytesIO(data), self.image_size, self.name(index)).transpose(2, 0, 1)
        return label

    def encoded(self, index: int) -> tuple[memoryview, int]:
        """A sample's image file and its label."""
        # The label precedes the image, with a tar header of 512 bytes between them: one read gets both.
        start, label_size = self._labels[index].tolist()
        offset, size = self._images[index].tolist()
        data = bytearray(offset + size - start)
        self._read(index, [data], start)
        return memoryview(data)[offset - start :], self._label(index, data[:label_size])

    def _read_raw(self, index: int, image: np.ndarray) -> int:
        start, label_size = self._labels[index].tolist()
        offset, size = self._images[index].tolist()
        if size != image.nbytes:
            raise UnreadableSample(self.name(index), f"{size} bytes, not {image.nbytes}")
        before = bytearray(offset - start)
        # Read the pixels directly into `image`.
        self._read(index, [before, image], start)
        return self._label(index, before[:label_size])

    def _read(self, index: int, buffers: list, start: int) -> None:
        number = int(self.shard_of[index])
        file, path = self._open(number), self.folder / self.manifest.shards[number].name
        size = sum(memoryview(buffer).nbytes for buffer in buffers)
        try:
            read = os.preadv(file.fileno(), buffers, start)
        except OSError as error:
            raise UserError(f"cannot read shard {path}: {error.strerror}") from None
        if read != size:
            raise UserError(f"shard {path} was truncated during the run: restore it, then use --resume")

    def _label(self, index: int, digits: bytearray) -> int:
        label = read_label(digits, len(self.class_names))
        if label is None:
            raise UnreadableSample(self.name(index), f"its label is {bytes(digits)!r}")
        return label

    def _open_shard(self, number: int) -> BinaryIO:
        path = self.shard_path(number)
        try:
            return open_regular(path, buffering=0)
        except OSError as error:
            raise UserError(f"cannot open shard {path}: {error.strerror}; restore it, then use --resume") from None

    def shard_path(self, number: int) -> Path:
        return self.folder / self.manifest.shards[number].name


def open_shards(path: Path, image_size: int, split: str) -> ShardSource:
    """The shard set of a split: `path` itself, or its subfolder.

    Raises:
        UserError: no shard set there, or its classes differ from those of the training set.
    """
    words_of(split)
    if os.path.isfile(path / MANIFEST):
        source = ShardSource(path, image_size)
        source.held_out = False
        return source
    splits = splits_in(path)
    if not splits:
        raise UserError(
            f"no {MANIFEST} in {path} or in a subfolder {' or '.join(words_of(split))}: "
            "make the set with unite-fast shards; if that was interrupted, run it again"
        )
    name = choose_split(splits, split, path)
    source = ShardSource(path / name, image_size)
    source.split, source.held_out = name, is_held_out(name)
    training = training_folder(path, splits, name)
    if training is not None:
        classes = list(read_manifest(training / MANIFEST).classes)
        check_same_classes(source.class_names, classes, path / name, training)
    return source


def splits_in(path: Path) -> dict[str, str]:
    """The subfolders that have a split's name and hold a shard set: word -> name."""
    if not os.path.isdir(path):
        return {}
    folders = (folder for folder in sorted(path.glob("*")) if folder.name.lower() in WORDS)
    return {folder.name.lower(): folder.name for folder in folders if os.path.isfile(folder / MANIFEST)}
