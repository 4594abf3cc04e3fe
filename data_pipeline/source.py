"""What every source of images offers, and the simplest one: all of it in memory."""

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
        name: which one, as `Source.name` says it.
        reason: one line.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class Source(ABC):
    """A fixed, finite list of labelled square images, numbered from 0.

    `read_into` may be called from several threads at once, and from forked processes.

    Attributes:
        image_size: side of every image in pixels.
        class_names: one name a class; label i is `class_names[i]`, so its length is the number of classes.
        workers: what reads a batch ahead of need. "processes" where reading is work for a processor (decoding), so
            that it takes no time from the interpreter that trains; "threads" where it is waiting for a disk; "none"
            where it only copies memory: one call for a whole batch is then fastest, and no sample is ever broken.
    """

    image_size: int
    class_names: list[str]
    workers: Literal["processes", "threads", "none"] = "processes"

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are; never 0."""

    @abstractmethod
    def class_counts(self) -> list[int]:
        """How many samples of each class."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call a sample in a message: one line, different for each."""

    @abstractmethod
    def read_into(self, index: int, image: np.ndarray) -> int:
        """Fill `image`, uint8 [3, image_size, image_size], with a sample; returns its label.

        Raises:
            UnreadableSample: it is broken. `image` then holds anything.
        """

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Some samples, in the order asked for.

        Args:
            indices: int64 [n], in [0, len).

        Returns:
            images uint8 [n, 3, image_size, image_size] and labels int64 [n].

        Raises:
            UnreadableSample: for the first of them that is broken.
        """
        indices = torch.as_tensor(indices, dtype=torch.int64).tolist()
        images = np.empty((len(indices), 3, self.image_size, self.image_size), np.uint8)
        labels = [self.read_into(index, image) for index, image in zip(indices, images, strict=True)]
        return torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64)

    def order(self, seed: int, epoch: int) -> Tensor:
        """The samples of one epoch, each once, int64 [len]: any permutation, all equally likely.

        A source where some orders would be far slower than others may choose among fewer.
        """
        return permutation(seed, epoch, len(self))


def read_readable(source: Source, indices: Iterable[int], most: int) -> tuple[Tensor, Tensor]:
    """The first `most` samples of `indices` that are not broken: images uint8 [n, 3, S, S] and labels int64 [n].

    Raises:
        UserError: all of them are broken.
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
    """Grey images held in memory, handed out with three equal channels."""

    workers = "none"

    def __init__(self, title: str, images: Tensor, labels: Tensor, class_names: list[str]):
        """
        Args:
            title: what `name` puts before the sample's number.
            images: uint8 [n, image_size, image_size].
            labels: int64 [n].
            class_names: one name a class.
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

    def read_into(self, index: int, image: np.ndarray) -> int:
        image[:] = self.images[index].numpy()
        return int(self.labels[index])

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        indices = torch.as_tensor(indices, dtype=torch.int64)
        images = self.images[indices].unsqueeze(1).repeat(1, 3, 1, 1)
        return images, self.labels[indices]
