"""A folder of image files, one subfolder per class."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from unite_fast.data_pipeline.images import adm_center_crop
from unite_fast.data_pipeline.source import Source, UnreadableSample, one_line
from unite_fast.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Checked by content, not by extension: ImageNet has a PNG named .JPEG. The list is short so that no file reaches a
# Pillow decoder that starts another program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
SPLIT_FOLDERS = {"train": ("train",), "test": ("val", "test")}


class FolderSource(Source):
    """Image files, decoded and centre-cropped when read. The classes are the subfolders, sorted by name.

    Class folders may be nested deeper. A class folder may be a symbolic link; links below it are not followed. Names
    that start with a dot and files without an image extension are ignored.
    """

    def __init__(self, path: Path, image_size: int, split: str):
        """
        Args:
            path: a folder of class folders, or a folder with train/ and val/ or test/, each a folder of class folders.
                Without them, the splits "train" and "test" are the same images. With them, train/ defines the classes
                of both splits, so that labels agree.
            image_size: side of the cropped images, pixels.
            split: "train" or "test".

        Raises:
            UserError: no such folder, no class folders, a class without images, or a class that train/ lacks.
        """
        self.image_size = image_size
        self.root = _split_folder(path, split)
        self.files: list[str] = []
        self.labels: list[int] = []
        classes = _subfolders(self.root)
        if not classes:
            raise UserError(f"no class folders in {self.root}: put the images into one subfolder per class")
        self.class_names = classes
        if self.root != path and (path / "train").is_dir():
            self.class_names = _subfolders(path / "train")
        for class_name in classes:
            if class_name not in self.class_names:
                raise UserError(
                    f"there is no class folder {class_name} in {path / 'train'}: remove {self.root / class_name}"
                )
            files = _image_files(self.root, class_name)
            if not files:
                extensions = " ".join(IMAGE_EXTENSIONS)
                raise UserError(
                    f"no images ({extensions}) in class folder {self.root / class_name}: add some or remove it"
                )
            self.files += files
            self.labels += [self.class_names.index(class_name)] * len(files)

    @property
    def loaders(self) -> tuple[str, ...]:
        return ("folder",)

    def __len__(self) -> int:
        return len(self.files)

    def class_counts(self) -> list[int]:
        return np.bincount(self.labels, minlength=len(self.class_names)).tolist()

    def name(self, index: int) -> str:
        """The file's path, relative to the folder of class folders."""
        # A file name may hold line breaks or bytes that are not text; a message must not.
        return one_line(os.fsencode(self.files[index]).decode(errors="backslashreplace"))

    def read_into(self, index: int, image: np.ndarray) -> int:
        pixels = read_image(self.root / self.files[index], self.image_size, self.name(index))
        image[:] = pixels.transpose(2, 0, 1)
        return self.labels[index]


def read_image(path: str | Path, image_size: int, name: str | None = None) -> np.ndarray:
    """Decode and centre-crop an image file: uint8 [image_size, image_size, 3].

    Raises:
        UnreadableSample: the file is missing, broken or not an image. The message names `name`, or else the path.
    """
    return decode_image(path, image_size, name or str(path))


def read_images(paths: list[Path], size: int) -> Tensor:
    """Decode and centre-crop image files: uint8 [n, 3, size, size].

    Raises:
        UserError: a file is missing, broken or not an image.
    """
    try:
        images = [read_image(path, size) for path in paths]
    except UnreadableSample as error:
        raise UserError(f"cannot read {error.name}: {error.reason}") from error
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def decode_image(file: str | Path | BinaryIO, image_size: int, name: str) -> np.ndarray:
    """Like `read_image`, for an open file too; `name` is its name in the message."""
    with open_image(file, name) as image:
        return adm_center_crop(image, image_size)


@contextmanager
def open_image(file: str | Path | BinaryIO, name: str) -> Iterator[Image.Image]:
    """Open an image file. Any error inside the `with` block, where it is decoded, becomes an UnreadableSample."""
    try:
        with Image.open(file, formats=_FORMATS) as image:
            yield image
    except UnidentifiedImageError:
        raise UnreadableSample(name, "not an image of a known format") from None
    except OSError as error:
        raise UnreadableSample(name, error.strerror or one_line(str(error))) from None
    except Exception as error:
        # On a broken file Pillow's decoders raise SyntaxError, ValueError, struct.error and more.
        raise UnreadableSample(name, one_line(str(error)) or type(error).__name__) from None


def _split_folder(path: Path, split: str) -> Path:
    if not path.is_dir():
        raise UserError(f"no folder {path}: give one with a subfolder per class (for training, data.path=FOLDER)")
    subfolders = set(_subfolders(path))
    names = set().union(*SPLIT_FOLDERS.values())
    # A class may be called "train", so a single such name among others is not a split.
    has_splits = subfolders and (subfolders <= names or ("train" in subfolders and subfolders & {"val", "test"}))
    if not has_splits:
        return path
    for name in SPLIT_FOLDERS[split]:
        if name in subfolders:
            return path / name
    raise UserError(
        f"no {' or '.join(SPLIT_FOLDERS[split])} folder in {path}, which has {', '.join(sorted(subfolders))}: add it"
    )


def _subfolders(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        _raise_user_error(error)


def _image_files(root: Path, class_name: str) -> list[str]:
    """Paths of the class's images relative to `root`, sorted."""
    files = []
    for folder, subfolders, names in os.walk(root / class_name, onerror=_raise_user_error):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        relative = os.path.relpath(folder, root)
        files += [
            os.path.join(relative, name)
            for name in names
            if not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS)
        ]
    return sorted(files)


def _raise_user_error(error: OSError) -> NoReturn:
    raise UserError(f"cannot list {error.filename}: {error.strerror}; make it readable or remove it")
