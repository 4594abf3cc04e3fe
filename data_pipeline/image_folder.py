"""A folder of pictures, one subfolder a class."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from unite_fast.data_pipeline.images import adm_center_crop
from unite_fast.data_pipeline.source import Source, UnreadableSample
from unite_fast.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# By content, whatever the extension: ImageNet has a PNG named .JPEG. A short list, so that no file can reach those of
# Pillow's decoders that start another program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
SPLIT_FOLDERS = {"train": ("train",), "test": ("val", "test")}


class FolderSource(Source):
    """Pictures decoded and centre-cropped as they are read. The classes are the subfolders, sorted by name.

    A class may hold further folders; a link to a folder is followed where it stands for a class, not below. Files and
    folders that start with a dot are ignored, as is every file without an image's extension.
    """

    def __init__(self, path: Path, image_size: int, split: str):
        """
        Args:
            path: folder of class folders; or of train/ and val/ or test/, each a folder of class folders. Without such
                folders the splits "train" and "test" are the same images. With them the classes of both splits are
                those of train/, so that a label means the same in both.

        Raises:
            UserError: no such folder, no class folders in it, a class without images, or one that train/ does not have.
        """
        self.image_size = image_size
        self.root = _split_folder(path, split)
        self.files: list[str] = []
        self.labels: list[int] = []
        found = _subfolders(self.root)
        if not found:
            raise UserError(f"no class folders in {self.root}: put the images into one subfolder per class")
        self.class_names = found
        if self.root != path and (path / "train").is_dir():
            self.class_names = _subfolders(path / "train")
        for class_name in found:
            if class_name not in self.class_names:
                raise UserError(f"class folder {self.root / class_name} has no partner in {path / 'train'}: remove it")
            files = _image_files(self.root, class_name)
            if not files:
                known = " ".join(IMAGE_EXTENSIONS)
                raise UserError(f"no images ({known}) in class folder {self.root / class_name}: add some or remove it")
            self.files += files
            self.labels += [self.class_names.index(class_name)] * len(files)

    def __len__(self) -> int:
        return len(self.files)

    def class_counts(self) -> list[int]:
        return np.bincount(self.labels, minlength=len(self.class_names)).tolist()

    def name(self, index: int) -> str:
        """The file's path below the folder of classes."""
        # A file name need not be text, nor a single line; a message must be.
        return _one_line(os.fsencode(self.files[index]).decode(errors="backslashreplace"))

    def read_into(self, index: int, image: np.ndarray) -> int:
        pixels = read_image(self.root / self.files[index], self.image_size, self.name(index))
        image[:] = pixels.transpose(2, 0, 1)
        return self.labels[index]


def read_image(path: str | Path, image_size: int, name: str | None = None) -> np.ndarray:
    """One picture file, decoded and centre-cropped: uint8 [image_size, image_size, 3].

    Raises:
        UnreadableSample: the file is missing, broken or no picture; `name` stands for the path in the message.
    """
    return decode_image(path, image_size, name or str(path))


def decode_image(file: str | Path | BinaryIO, image_size: int, name: str) -> np.ndarray:
    """The same for the contents of a picture file, called `name` in the message."""
    with open_picture(file, name) as picture:
        return adm_center_crop(picture, image_size)


@contextmanager
def open_picture(file: str | Path | BinaryIO, name: str) -> Iterator[Image.Image]:
    """A picture that is decoded and changed inside; whatever is wrong with it is an UnreadableSample."""
    try:
        with Image.open(file, formats=_FORMATS) as picture:
            yield picture
    except UnidentifiedImageError:
        raise UnreadableSample(name, "not an image of a known format") from None
    except OSError as error:
        raise UnreadableSample(name, error.strerror or _one_line(str(error))) from None
    except Exception as error:
        # On a broken file Pillow's decoders raise SyntaxError, ValueError, struct.error and more.
        raise UnreadableSample(name, _one_line(str(error)) or type(error).__name__) from None


def _split_folder(path: Path, split: str) -> Path:
    if not path.is_dir():
        raise UserError(f"no folder {path}: name one that has a subfolder per class (for training, data.path=FOLDER)")
    found = set(_subfolders(path))
    names = set().union(*SPLIT_FOLDERS.values())
    # A class may be called "train", so one such name among others does not make a split.
    has_splits = found and (found <= names or ("train" in found and found & {"val", "test"}))
    if not has_splits:
        return path
    for name in SPLIT_FOLDERS[split]:
        if name in found:
            return path / name
    raise UserError(
        f"no {' or '.join(SPLIT_FOLDERS[split])} folder in {path}, which has {', '.join(sorted(found))}: add it"
    )


def _subfolders(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        _refuse(error)


def _image_files(root: Path, class_name: str) -> list[str]:
    """Paths below `root` of the class's images, sorted."""
    files = []
    for folder, subfolders, names in os.walk(root / class_name, onerror=_refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        below = os.path.relpath(folder, root)
        files += [
            os.path.join(below, name)
            for name in names
            if not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS)
        ]
    return sorted(files)


def _refuse(error: OSError):
    raise UserError(f"cannot list {error.filename}: {error.strerror}; make it readable or remove it")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def read_images(paths: list[Path], size: int) -> Tensor:
    """Picture files, centre-cropped: uint8 [n, 3, size, size]."""
    try:
        images = [read_image(path, size) for path in paths]
    except UnreadableSample as error:
        raise UserError(f"cannot read {error.name}: {error.reason}") from error
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
