"""The interface of a source of images, and a source that holds all images in memory."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from unite_fast.errors import UserError
from unite_fast.randomness import permutation


class UnreadableSample(Exception):
    """One sample is broken; the others may be fine.

    Attributes:
        name: the sample, as `Source.name` names it.
        reason: one line.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class Source(ABC):
    """A fixed, finite list of labelled square images, numbered from 0. docs/adding-a-dataset.md has a small example.

    `read_into` may be called from several threads at once, and from forked processes.

    Attributes:
        image_size: side of every image in pixels.
        class_names: label i is called `class_names[i]`; the length is the number of classes.
        workers: how batches are prefetched. "processes" if reading costs CPU time (decoding), so that it does not slow
            the training process down; "threads" if reading waits for a disk; "none" if reading only copies memory: the
            training process then calls `read` for a whole batch, and no sample may be broken.
        split: name of the split in the data; empty: the data have no splits.
        held_out: whether the images are apart from the training images; None: unknown.
        left_out: what the data hold besides these images: a line for each reason, with the number and some names.
        notes: what a user should know about the listing, a line each.
    """

    image_size: int
    class_names: list[str]
    workers: Literal["processes", "threads", "none"] = "processes"
    split: str = ""
    held_out: bool | None = None
    left_out: Sequence[str] = ()
    notes: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples; never 0."""

    @abstractmethod
    def class_counts(self) -> list[int]:
        """Number of samples in each class."""

    @abstractmethod
    def name(self, index: int) -> str:
        """A sample's name for messages: one line, unique."""

    @abstractmethod
    def read_into(self, index: int, image: np.ndarray) -> int:
        """Write a sample to `image`, uint8 [3, image_size, image_size], and return its label.

        Raises:
            UnreadableSample: the sample is broken. The contents of `image` are then undefined.
        """

    @property
    def loaders(self) -> tuple[str, ...]:
        """The loaders that can read this source, names from `config.LOADERS`; the first is the usual one."""
        return ("memory",) if self.workers == "none" else ("source",)

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Read several samples, in the order of `indices`.

        Args:
            indices: int64 [n], in [0, len).

        Returns:
            images uint8 [n, 3, image_size, image_size] and labels int64 [n].

        Raises:
            UnreadableSample: the first broken sample among them.
        """
        indices = torch.as_tensor(indices, dtype=torch.int64).tolist()
        images = np.empty((len(indices), 3, self.image_size, self.image_size), np.uint8)
        labels = [self.read_into(index, image) for index, image in zip(indices, images, strict=True)]
        return torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64)

    def fingerprint(self) -> str:
        """SHA-256 in hex of the listing, the samples' names in order. A run stores it, so that it notices other data
        when it resumes. A source whose names do not depend on the images overrides this.
        """
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self.name(index).encode("utf-8", "backslashreplace") + b"\n")
        return digest.hexdigest()

    def order(self, seed: int, epoch: int) -> Tensor:
        """The order of one epoch, int64 [len]: a uniformly random permutation.

        A source that is slow in most orders may choose among fewer permutations.
        """
        return permutation(seed, epoch, len(self))


def read_readable(source: Source, indices: Iterable[int], most: int) -> tuple[Tensor, Tensor]:
    """The first `most` readable samples of `indices`: images uint8 [n, 3, S, S] and labels int64 [n].

    Raises:
        UserError: none can be read.
    """
    images, labels = [], []
    for index in indices:
        try:
            image, label = source.read([index])
        except UnreadableSample:
            continue
        images.append(image)
        labels.append(label)
        if len(images) == most:
            break
    if not images:
        raise UserError(f"none of the {len(source)} images can be read, e.g. {source.name(0)}")
    return torch.cat(images), torch.cat(labels)


class MemorySource(Source):
    """Grey images in memory, returned as RGB with three equal channels."""

    workers = "none"

    def __init__(self, title: str, images: Tensor, labels: Tensor, class_names: list[str]):
        """
        Args:
            title: sample i is called "TITLE i" in messages.
            images: uint8 [n, image_size, image_size].
            labels: int64 [n].
            class_names: one name per class.
        """
        self.title = title
        self.images = images
        self.labels = labels
        self.class_names = class_names
        self.image_size = images.shape[-1]

    def __len__(self) -> int:
        return len(self.labels)

    def class_counts(self) -> list[int]:
        return self.labels.bincount(minlength=len(self.class_names)).tolist()

    def name(self, index: int) -> str:
        return f"{self.title} {index}"

    def fingerprint(self) -> str:
        """SHA-256 of pixels and labels."""
        digest = hashlib.sha256(self.images.numpy().data)
        digest.update(self.labels.numpy().data)
        return digest.hexdigest()

    def read_into(self, index: int, image: np.ndarray) -> int:
        image[:] = self.images[index].numpy()
        return int(self.labels[index])

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        indices = torch.as_tensor(indices, dtype=torch.int64)
        images = self.images[indices].unsqueeze(1).repeat(1, 3, 1, 1)
        return images, self.labels[indices]
