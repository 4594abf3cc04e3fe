"""Grey images in IDX, the file format of MNIST, Fashion-MNIST, KMNIST and others.

An IDX file holds two zero bytes; the type of the values (8: unsigned byte); the number of dimensions; each dimension as
a big-endian 32-bit number; the values, last dimension fastest.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from unite_fast.data_pipeline.source import MemorySource
from unite_fast.errors import UserError

_PREFIX = {"train": "train", "test": "t10k"}


def open_idx(path: Path, image_size: int, split: str) -> MemorySource:
    """All images of one split, padded symmetrically with black up to `image_size`.

    The files hold no class names, so the classes are called "0", "1", ... up to the largest label of the split.

    Args:
        path: folder with train-images-idx3-ubyte, train-labels-idx1-ubyte and, for the split "test", the same with t10k
            in place of train; each may be compressed (.gz).
        image_size: side of the padded images, pixels.
        split: "train" or "test".

    Raises:
        UserError: a file is missing, not IDX, or not as long as its header says; the numbers of images and labels
            differ; or the images are larger than `image_size`.
    """
    images_file = _find(path, f"{_PREFIX[split]}-images-idx3-ubyte")
    labels_file = _find(path, f"{_PREFIX[split]}-labels-idx1-ubyte")
    images = torch.from_numpy(read_idx(images_file, dimensions=3))
    labels = torch.from_numpy(read_idx(labels_file, dimensions=1).astype(np.int64))

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
    class_names = [str(label) for label in range(int(labels.max()) + 1)]
    return MemorySource(f"{images_file} image", images, labels, class_names)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The values of an IDX file of unsigned bytes: uint8, writable. A name that ends in .gz means compressed.

    Raises:
        UserError: the file is unreadable, in another format, or not as long as its header says.
    """
    data = _contents(path)
    magic = bytes((0, 0, 8, dimensions))
    if not magic.startswith(data[:4]):
        raise UserError(
            f"{path} is not an IDX file of {dimensions} dimensions: it starts with {data[:4].hex()}, not {magic.hex()}"
        )
    header = 4 + 4 * dimensions
    if len(data) < header:
        raise UserError(f"{path} is truncated: {len(data)} bytes, the header alone has {header}; fetch the file again")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    if len(data) - header != math.prod(shape):
        fault = "truncated" if len(data) - header < math.prod(shape) else "too long"
        raise UserError(
            f"{path} is {fault}: its header promises {' x '.join(map(str, shape))} = {math.prod(shape)} bytes, "
            f"it holds {len(data) - header}; fetch the file again"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


def _find(folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise UserError(f"no {name} and no {name}.gz in {folder}: put the file there, or give the folder that holds it")


def _contents(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except EOFError:
        raise UserError(f"{path} is truncated: its compressed data ends early; fetch the file again") from None
    except (OSError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; fetch the file again") from None
