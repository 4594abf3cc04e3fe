"""Read .npz files that may have come from elsewhere: arrays of numbers only, with their sizes checked first."""

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from unite_fast.errors import reason_of
from unite_fast.utils.files import open_regular

MOST_BYTES = 2**34
"""Of all arrays together."""
FREE_BYTES, MOST_RATIO = 2**28, 100
"""An array of up to so many bytes may be compressed as far as it goes, and a larger one to a hundredth. No arrays of
numbers compress like that, but files that are made to fill the memory do."""


def read_npz(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, np.ndarray]:
    """The arrays of an .npz file whose names are `wanted`; the others are not looked at. Nothing is unpickled.

    Returns:
        Arrays of floats, integers or booleans in the machine's byte order.

    Raises:
        OSError: the file cannot be read, or is no regular file.
        ValueError: no .npz file, or damaged; an array of another kind; sizes that do not fit the file.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            infos = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            members = {name: info for info in infos if wanted(name := info.filename.removesuffix(".npy"))}
            if len({info.filename for info in infos}) < len(infos):
                raise ValueError("a name stands twice")
            for name, info in members.items():
                if info.file_size > max(FREE_BYTES, MOST_RATIO * info.compress_size):
                    raise ValueError(f"{name!r} is compressed too far")
            if sum(info.file_size for info in members.values()) > MOST_BYTES:
                raise ValueError("the arrays are too large")
            arrays = {}
            for name, info in members.items():
                try:
                    with archive.open(info) as member:
                        arrays[name] = _read_array(member, info.file_size)
                except Exception as error:  # of zip, zlib, and numpy, which evaluates the text of a header
                    raise ValueError(f"{name!r}: {reason_of(error)}") from error
            return arrays
    except (OSError, ValueError):
        raise
    except Exception as error:  # zipfile raises several for damaged files
        raise ValueError(reason_of(error)) from error


def _read_array(file: IO[bytes], size: int) -> np.ndarray:
    """Read a .npy file of `size` bytes."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"a .npy file of version {version}")
    if dtype.kind not in "fiub" or dtype.itemsize > 8 or any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"an array of {dtype}, not of numbers")
    length = math.prod(shape) * dtype.itemsize
    if length > size or file.tell() + length != size:
        raise ValueError("an array is longer or shorter than its header says")
    content = bytearray(length)
    view, done = memoryview(content), 0
    while done < length:
        count = file.readinto(view[done:])  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise EOFError("an array ends early")
        done += count
    file.read(1)  # at the end of a member, its CRC-32 is compared
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C")
    return np.ascontiguousarray(array.astype(dtype.newbyteorder("="), copy=False)).reshape(shape)
