"""Synthetic images for timing: as many as in ImageNet, made from one block of noise, no disk reads."""

import numpy as np
import torch

from unite_fast.data_pipeline.source import Source
from unite_fast.randomness import Philox, Stream

COUNTS = {"train": 1_281_167, "test": 50_000}
"""Number of images in ImageNet's splits."""


class SyntheticSource(Source):
    """Image i is the noise from byte i on, so all images differ and reading one only copies memory. Its label is i
    modulo the number of classes."""

    workers = "none"

    def __init__(self, image_size: int, split: str, num_classes: int):
        """
        Args:
            image_size: side of the images, pixels.
            split: a key of `COUNTS`; each split has its own noise.
            num_classes: labels are in [0, num_classes).
        """
        self.image_size, self.split = image_size, split
        self.class_names = [str(label) for label in range(num_classes)]
        length = COUNTS[split] + 3 * image_size**2
        seed = list(COUNTS).index(split)
        words = Philox(seed, 0, torch.zeros(1, dtype=torch.int64)).words(Stream.SYNTHETIC, (-(-length // 4),))
        self.noise = words.numpy().astype("<u4").view(np.uint8).reshape(-1)[:length]

    def __len__(self) -> int:
        return COUNTS[self.split]

    def class_counts(self) -> list[int]:
        classes = len(self.class_names)
        return [len(range(label, len(self), classes)) for label in range(classes)]

    def name(self, index: int) -> str:
        return f"synthetic image {index} of split {self.split}"

    def fingerprint(self) -> str:
        """The title of the noise: the code alone decides what it is."""
        return f"synthetic {self.split} {self.image_size}"

    def read_into(self, index: int, image: np.ndarray) -> int:
        image[:] = self.noise[index : index + image.size].reshape(image.shape)
        return index % len(self.class_names)
