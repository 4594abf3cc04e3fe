"""A folder of image files, one subfolder per class."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from unite_fast.data_pipeline.images import adm_center_crop
from unite_fast.data_pipeline.listing import (
    HIDDEN,
    LINK,
    NO_CLASS,
    NO_SPLIT,
    NOT_REGULAR,
    OTHER_EXTENSION,
    LeftOut,
    Names,
)
from unite_fast.data_pipeline.source import Source, UnreadableSample
from unite_fast.data_pipeline.splits import (
    TEST,
    check_no_splits_below,
    choose_split,
    find_splits,
    is_held_out,
    renumber,
    training_folder,
    words_of,
)
from unite_fast.errors import UserError, printable, reason_of
from unite_fast.utils.files import open_regular

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_SAMPLED_CLASSES, _SAMPLED_BYTES = 1000, 4096
"""What a fingerprint reads of the files."""
# Checked by content, not by extension: ImageNet has a PNG named .JPEG. The list is short so that no file reaches a
# Pillow decoder that starts another program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")


class FolderSource(Source):
    """Image files, decoded and centre-cropped when read. The classes are the subfolders, sorted by name.

    Class folders may be nested deeper. A class folder may be a symbolic link; links below it are not followed. Names
    that start with a dot and files without an image extension are left out.
    """

    def __init__(self, path: Path, image_size: int, split: str):
        """
        Args:
            path: a folder of class folders, or of splits (`splits.find_splits`), each a folder of class folders. If
                there are no splits, every split is all images. If there are, the training images define the classes of
                all of them, so that labels agree.
            image_size: side of the cropped images, pixels.
            split: see `splits.words_of`.

        Raises:
            UserError: no such folder, no class folders, a class without images, or a class that train/ lacks.
        """
        self.image_size = image_size
        place = find_split_folder(path, split)
        self.root, self.split, self.held_out = place.root, place.split, place.held_out
        classes = subfolders(self.root)
        if not classes:
            raise UserError(f"no class folders in {self.root}: put the images into one subfolder per class")
        _check_distinct(
            self.root, classes, [path / other for other in place.others if is_held_out(other) != self.held_out]
        )
        self.class_names, labels = classes, list(range(len(classes)))
        if place.training is not None:
            self.class_names = subfolders(place.training)
            labels = renumber(classes, self.class_names, self.root, place.training)
        left_out, listed = LeftOut(), []
        for class_name in classes:
            names, folders = list_images(self.root, class_name, left_out)
            check_no_splits_below(class_name, folders, self.root)
            if not len(names):
                extensions = " ".join(IMAGE_EXTENSIONS)
                raise UserError(
                    f"no images ({extensions}) in class folder {self.root / class_name}: add some or remove it"
                )
            listed.append(names)
        for name in _files(self.root):
            left_out.add(HIDDEN if name.startswith(".") else NO_CLASS, name)
        if self.split:
            for name in [*subfolders(path), *_files(path)]:
                if name not in (self.split, *place.others):
                    left_out.add(NO_SPLIT, name)
        self.listed_left_out, self.left_out = left_out, left_out.lines()
        self.files = Names.join(listed)
        self.labels = np.repeat(np.array(labels, np.int32), [len(names) for names in listed])

    @property
    def loaders(self) -> tuple[str, ...]:
        return ("folder",)

    def __len__(self) -> int:
        return len(self.files)

    def class_counts(self) -> list[int]:
        return np.bincount(self.labels, minlength=len(self.class_names)).tolist()

    def name(self, index: int) -> str:
        """The file's path, relative to the folder of class folders."""
        return printable(self.files[index])

    def fingerprint(self) -> str:
        """SHA-256 of the files' paths, relative to the folder of class folders, their labels, and the size and start of
        the first file of some classes: names such as 0.png do not tell that two classes were swapped."""
        digest = self.files.digest()
        digest.update(self.labels.data)
        firsts = np.unique(self.labels, return_index=True)[1].tolist()
        for index in firsts[:_SAMPLED_CLASSES]:
            with suppress(OSError), open_regular(self.root / self.files[index]) as file:
                digest.update(b"%d " % os.fstat(file.fileno()).st_size + file.read(_SAMPLED_BYTES))
        return digest.hexdigest()

    def read_into(self, index: int, image: np.ndarray) -> int:
        pixels = read_image(self.root / self.files[index], self.image_size, self.name(index))
        image[:] = pixels.transpose(2, 0, 1)
        return int(self.labels[index])


def read_image(path: str | Path, image_size: int, name: str | None = None) -> np.ndarray:
    """Decode and centre-crop an image file: uint8 [image_size, image_size, 3].

    Raises:
        UnreadableSample: the file is missing, broken or not an image. The message names `name`, or else the path.
    """
    return decode_image(path, image_size, name or printable(path))


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
        # A path that is not a regular file could block for ever, or have no end.
        opened = open_regular(file) if isinstance(file, (str, Path)) else nullcontext(file)
        with opened as stream, Image.open(stream, formats=_FORMATS) as image:
            yield image
    except UnidentifiedImageError:
        raise UnreadableSample(name, "not an image of a known format") from None
    except Exception as error:
        # On a broken file Pillow's decoders raise SyntaxError, ValueError, struct.error and more.
        raise UnreadableSample(name, reason_of(error)) from None


@dataclass(frozen=True)
class SplitFolder:
    """Where the images of a split lie.

    Attributes:
        root: the folder of class folders.
        split: the name of its folder; empty if the data have no splits.
        held_out: whether these images are apart from the training images.
        training: the folder of the training images, if this is another split and there is one.
        others: names of the other splits.
    """

    root: Path
    split: str = ""
    held_out: bool = False
    training: Path | None = None
    others: tuple[str, ...] = ()


def find_split_folder(path: Path, split: str, flat: bool = False) -> SplitFolder:
    """Where the images of `split` lie in a folder of class folders or of splits.

    Args:
        flat: whether the split may lack class folders. If not, a test split without them, as ImageNet's, gives way to
            validation.

    Raises:
        NoSplit: the folder has splits, but not this one.
        UserError: no such folder; an unknown split; a held-out split that is a link to the training images.
    """
    words_of(split)
    if path.is_file():
        raise UserError(
            f"{path} is a file: give a folder with a subfolder per class; unite-fast shards reads tar files"
        )
    if not path.is_dir():
        raise UserError(f"no folder {path}: give one with a subfolder per class (for training, data.path=FOLDER)")
    splits = find_splits(subfolders(path))
    if not splits:
        return SplitFolder(path)
    name = choose_split(splits, split, path) if flat else _with_classes(path, splits, split)
    others = tuple(other for other in splits.values() if other != name)
    return SplitFolder(path / name, name, is_held_out(name), training_folder(path, splits, name), others)


def _with_classes(path: Path, splits: dict[str, str], split: str) -> str:
    """The name of the split; not of a test split without class folders, if there is a validation split."""
    name = choose_split(splits, split, path)
    if name.lower() in TEST and not subfolders(path / name):
        rest = {word: other for word, other in splits.items() if word not in TEST}
        if any(word in rest for word in words_of(split)):
            return choose_split(rest, split, path)
    return name


def subfolders(path: Path) -> list[str]:
    """Names of the folders in `path`, sorted."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        _raise_user_error(error)


def _files(path: Path) -> list[str]:
    """Names in `path` that are no folders, sorted."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if not entry.is_dir())
    except OSError as error:
        _raise_user_error(error)


def _check_distinct(root: Path, classes: list[str], others: list[Path]) -> None:
    """
    Args:
        others: folders of splits that must not share images with this one.

    Raises:
        UserError: a class folder is a link to another one, to a folder in it or above it, or into another split. Each
            of its images would have two labels, or be both training and held-out.
    """
    real = sorted((os.path.join(os.path.realpath(root / name), ""), name) for name in classes)
    around = os.path.join(os.path.realpath(root), "")
    for folder, name in real:
        if around.startswith(folder):
            raise UserError(f"the class folder {name} in {root} is a link to a folder above it: remove it")
        for other in others:
            if folder.startswith(os.path.join(os.path.realpath(other), "")):
                raise UserError(
                    f"the class folder {name} in {root} is a link into {other}: its images would be both "
                    "training and held-out; remove it"
                )
    for (outer, one), (inner, other) in itertools.pairwise(real):
        if inner.startswith(outer):
            raise UserError(
                f"the class folders {one} and {other} in {root} are one folder, or one is within "
                "the other: remove a link"
            )


def list_images(root: Path, start: str, left_out: LeftOut) -> tuple[Names, list[str]]:
    """List the images below `root`/`start`, at any depth.

    Args:
        start: a folder in `root`, or "" for `root` itself.
        left_out: what is not listed is added to it.

    Returns:
        The paths of the images, relative to `root` and sorted; and the names of the folders in `start`.

    Raises:
        UserError: a folder cannot be listed.
    """
    files, folders, first = [], [start], []
    try:
        while folders:
            folder = folders.pop()
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    name = os.path.join(folder, entry.name)
                    if entry.name.startswith("."):
                        left_out.add(HIDDEN, name)
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(name)
                        if folder == start:
                            first.append(entry.name)
                    elif entry.is_symlink() and entry.is_dir():
                        left_out.add(LINK, name)
                    elif not entry.name.lower().endswith(IMAGE_EXTENSIONS):
                        left_out.add(OTHER_EXTENSION, name)
                    elif entry.is_symlink() or entry.is_file():
                        files.append(name)
                    else:
                        left_out.add(NOT_REGULAR, name)
    except OSError as error:
        _raise_user_error(error)
    return Names(sorted(files)), first


def _raise_user_error(error: OSError) -> NoReturn:
    raise UserError(f"cannot list {error.filename}: {error.strerror}; make it readable or remove it")
