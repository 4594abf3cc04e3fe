"""Grey images in IDX, the file format of MNIST, Fashion-MNIST, KMNIST and others.

An IDX file holds two zero bytes; the type of the values (8: unsigned byte); the number of dimensions; each dimension as
a big-endian 32-bit number; the values, last dimension fastest.
"""

import gzip
import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
import torch.nn.functional as F

from unite_fast.data_pipeline.source import MemorySource
from unite_fast.data_pipeline.splits import ClassesDiffer
from unite_fast.errors import UserError, reason_of
from unite_fast.utils.files import open_regular

_PREFIX = {"train": "train", "test": "t10k"}
_PIECE = 2**24


def open_idx(path: Path, image_size: int, split: str) -> MemorySource:
    """All images of one split, padded symmetrically with black up to `image_size`.

    The files hold no class names, so the classes are called "0", "1", ... up to the largest label of the training
    images, or of the split if they are missing.

    Args:
        path: folder with train-images-idx3-ubyte, train-labels-idx1-ubyte and, for the split "test", the same with t10k
            in place of train; each may be compressed (.gz).
        image_size: side of the padded images, pixels.
        split: "train" or "test".

    Raises:
        UserError: a file is missing, not IDX, or not as long as its header says; the numbers of images and labels
            differ; the images are larger than `image_size`; or a label is larger than those of the training images.
    """
    images_file = _find(path, f"{_PREFIX[split]}-images-idx3-ubyte")
    labels_file = _find(path, f"{_PREFIX[split]}-labels-idx1-ubyte")
    images = torch.from_numpy(read_idx(images_file, dimensions=3))
    labels = _read_labels(labels_file)

    n, height, width = images.shape
    if n != len(labels):
        raise UserError(
            f"{images_file} has {n} images but {labels_file} has {len(labels)} labels: they do not belong together"
        )
    if images.numel() == 0:
        raise UserError(f"{images_file} is empty ({n} images of {height} x {width}): fetch the file again")
    if max(height, width) > image_size:
        raise UserError(
            f"{images_file} has images of {height} x {width}, larger than image_size {image_size}: "
            f"set image_size to {max(height, width)} or more"
        )

    top, left = (image_size - height) // 2, (image_size - width) // 2
    images = F.pad(images, (left, image_size - width - left, top, image_size - height - top))
    largest = int(labels.max())
    if split != "train" and (training := _existing(path, f"{_PREFIX['train']}-labels-idx1-ubyte")):
        largest_in_training = int(_read_labels(training).max(initial=-1))
        if largest > largest_in_training:
            raise ClassesDiffer(
                f"{labels_file} has the label {largest}, but the largest in {training} is {largest_in_training}: "
                "they do not belong together"
            )
        largest = largest_in_training
    class_names = [str(label) for label in range(largest + 1)]
    labels = torch.from_numpy(labels)
    return MemorySource(f"{images_file} image", images, labels, class_names)


def _read_labels(path: Path) -> np.ndarray:
    """int64 [n]."""
    return read_idx(path, dimensions=1).astype(np.int64)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The values of an IDX file of unsigned bytes: uint8, writable. A name that ends in .gz means compressed.

    Of a file that holds more than its header says, only one byte more is read.

    Raises:
        UserError: the file is unreadable, in another format, or not as long as its header says.
    """
    magic = bytes((0, 0, 8, dimensions))
    header = 4 + 4 * dimensions
    with _opened(path) as file:
        start = file.read(header)
        if not magic.startswith(start[:4]):
            raise UserError(
                f"{path} is not an IDX file of {dimensions} dimensions: it starts with {start[:4].hex()}, "
                f"not {magic.hex()}"
            )
        if len(start) < header:
            raise UserError(
                f"{path} is truncated: {len(start)} bytes, the header alone has {header}; fetch the file again"
            )
        shape = struct.unpack(f">{dimensions}I", start[4:])
        values = _read_at_most(file, math.prod(shape) + 1)
    if len(values) != math.prod(shape):
        short = len(values) < math.prod(shape)
        raise UserError(
            f"{path} is {'truncated' if short else 'too long'}: its header promises {' x '.join(map(str, shape))} = "
            f"{math.prod(shape)} bytes, it holds {len(values) if short else 'more'}; fetch the file again"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    if file := _existing(folder, name):
        return file
    raise UserError(f"no {name} and no {name}.gz in {folder}: put the file there, or give the folder that holds it")


def _existing(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / name, folder / f"{name}.gz") if os.path.exists(file)), None)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, decompressed if its name ends in .gz. Errors inside the `with` block become UserErrors."""
    try:
        with open_regular(path) as file:
            if path.suffix == ".gz":
                with gzip.GzipFile(fileobj=file) as decompressed:
                    yield cast(BinaryIO, decompressed)
            else:
                yield file
    except EOFError:
        raise UserError(f"{path} is truncated: its compressed data ends early; fetch the file again") from None
    except (OSError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}; fetch the file again") from None


def _read_at_most(file: BinaryIO, size: int) -> bytearray:
    """In pieces: a header may promise more than there is, and than fits into memory."""
    data = bytearray()
    while len(data) < size and (piece := file.read(min(size - len(data), _PIECE))):
        data += piece
    return data
