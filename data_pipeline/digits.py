"""The 1797 handwritten digits of scikit-learn: 8 x 8 pixels, no download."""

from typing import Any

import numpy as np
import torch

from unite_fast.data_pipeline.source import MemorySource
from unite_fast.errors import UserError

_SIZE = 8
_WHITE = 16  # the largest pixel value in scikit-learn's copy


def open_digits(image_size: int, split: str) -> MemorySource:
    """The digits. The split "test" is a fixed 20 % of every class.

    Raises:
        UserError: `image_size` is not 8.
    """
    if image_size != _SIZE:
        raise UserError(f"the digits are 8 x 8 pixels, image_size is {image_size}: set it to 8 or choose other data")
    # Imported here because it takes seconds and no other source needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()  # a Bunch, which the type stubs do not know
    train, test = train_test_split(np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target)
    chosen = np.sort(train if split == "train" else test)
    images = np.rint(digits.images[chosen] * (255 / _WHITE)).astype(np.uint8)
    labels = digits.target[chosen].astype(np.int64)
    class_names = [str(name) for name in digits.target_names]
    return MemorySource(f"digit of split {split}", torch.from_numpy(images), torch.from_numpy(labels), class_names)
