"""What every source of images offers, and the simplest one: all of it in memory."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from unite_fast.errors import UserError


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


class Source(Protocol):
    """A fixed, finite list of labelled square images, numbered from 0.

    `read` may be called from several threads at once.

    Attributes:
        image_size: side of every image in pixels.
        class_names: one name a class; label i is `class_names[i]`, so its length is the number of classes.
        in_memory: True when `read` only copies memory: one call for a whole batch is then fastest, threads are of no
            use, and `read` never raises UnreadableSample.
    """

    image_size: int
    class_names: list[str]
    in_memory: bool

    def __len__(self) -> int:
        """How many samples there are; never 0."""

    def name(self, index: int) -> str:
        """What to call a sample in a message: one line, different for each."""

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Some samples, in the order asked for.

        Args:
            indices: int64 [n], in [0, len).

        Returns:
            images uint8 [n, 3, image_size, image_size] and labels int64 [n].

        Raises:
            UnreadableSample: for the first of them that is broken.
        """


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


class MemorySource:
    """Grey images held in memory, handed out with three equal channels."""

    in_memory = True

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

    def name(self, index: int) -> str:
        return f"{self.title} {index}"

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        indices = torch.as_tensor(indices, dtype=torch.int64)
        images = self.images[indices].unsqueeze(1).repeat(1, 3, 1, 1)
        return images, self.labels[indices]
