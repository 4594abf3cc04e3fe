"""Read single samples of a shard set in any order, through the shards' indices."""

import functools
import io
import os
from pathlib import Path

import numpy as np

from unite_fast.data_pipeline.image_folder import SPLIT_FOLDERS, decode_image
from unite_fast.data_pipeline.shards.manifest import MANIFEST, Index, Shard, index_path, read_index, read_manifest
from unite_fast.data_pipeline.source import Source, UnreadableSample
from unite_fast.errors import UserError

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
        index = read_index(index_path(path))
        if len(index.keys) != shard.samples:
            raise UserError(
                f"{index_path(path)} has {len(index.keys)} samples, the manifest says {shard.samples}: "
                "restore it, or make the set again"
            )
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
        file = self._open(int(self.shard_of[index]))
        size = sum(memoryview(buffer).nbytes for buffer in buffers)
        try:
            read = os.preadv(file.fileno(), buffers, start)
        except OSError as error:
            raise UserError(f"cannot read shard {file.name}: {error.strerror}") from None
        if read != size:
            raise UserError(f"shard {file.name} was truncated during the run: restore it, then use --resume")

    def _label(self, index: int, digits: bytearray) -> int:
        label = int(digits) if digits.isdigit() else -1
        if not 0 <= label < len(self.class_names):
            raise UnreadableSample(self.name(index), f"its label is {bytes(digits)!r}")
        return label

    def _open_shard(self, number: int) -> io.FileIO:
        path = self.shard_path(number)
        try:
            return open(path, "rb", buffering=0)
        except OSError as error:
            raise UserError(f"cannot open shard {path}: {error.strerror}; restore it, then use --resume") from None

    def shard_path(self, number: int) -> Path:
        return self.folder / self.manifest.shards[number].name


def split_folder(path: Path, split: str) -> Path:
    """The folder of a split's shard set: `path` itself, or its subfolder train, val or test.

    Raises:
        UserError: no shard set there.
    """
    if (path / MANIFEST).is_file():
        return path
    for name in SPLIT_FOLDERS[split]:
        if (path / name / MANIFEST).is_file():
            return path / name
    raise UserError(
        f"no {MANIFEST} in {path} or in its subfolder {' or '.join(SPLIT_FOLDERS[split])}: "
        "make the set with unite-fast shards; if that was interrupted, run it again"
    )
