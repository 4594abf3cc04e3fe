"""A folder of image files, one subfolder per class."""

import itertools
import os
from collections.abc import Collection, Iterator, Sequence
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
    CLUTTER,
    COMPARED,
    HIDDEN,
    LINK,
    NO_CLASS,
    NO_SPLIT,
    NOT_REGULAR,
    OTHER_EXTENSION,
    LeftOut,
    Names,
    alike,
    is_clutter,
    note_on_both,
)
from unite_fast.data_pipeline.molecules.set_file import check_no_molecules
from unite_fast.data_pipeline.source import Source, UnreadableSample
from unite_fast.data_pipeline.splits import (
    TEST,
    WORDS,
    check_no_split_is_a_class,
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
_SAMPLED_FILES, _SAMPLED_BYTES = 1000, 4096
"""What a fingerprint reads: so many classes, so many files, so much of each."""
# Checked by content, not by extension: ImageNet has a PNG named .JPEG. The list is short so that no file reaches a
# Pillow decoder that starts another program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")


class FolderSource(Source):
    """Image files, decoded and centre-cropped when read. The classes are the subfolders, sorted by name.

    Class folders may be nested deeper. A class folder may be a symbolic link; links below it are not followed. Names
    that start with a dot, folders of a system such as __MACOSX, and files without an image extension are left out.
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
            packed = any(name.lower().endswith((".tar", ".parquet")) for name in os.listdir(self.root))
            hint = (
                "unite-fast shards reads its tar or Parquet files"
                if packed
                else "put the images into a subfolder per class"
            )
            raise UserError(f"no class folders in {self.root}: {hint}")
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
            if class_name.lower() in WORDS:
                check_no_split_is_a_class(class_name, folders, _any_in(class_name, names), self.root)
            if not len(names):
                extensions = " ".join(IMAGE_EXTENSIONS)
                raise UserError(
                    f"no images ({extensions}) in class folder {self.root / class_name}: add some or remove it"
                )
            listed.append(names)
        _count_others(self.root, NO_CLASS, (), left_out)
        if self.split:
            _count_others(path, NO_SPLIT, (self.split, *place.others), left_out)
        self.listed_left_out, self.left_out = left_out, left_out.lines()
        self.files = Names.join(listed)
        self.labels = np.repeat(np.array(labels, np.int32), [len(names) for names in listed])
        self.notes = alike(self.class_names) + one_class(classes, folders, self.root)
        if place.training is not None:
            self.notes += self._in_both(place.training)

    def _in_both(self, training: Path) -> list[str]:
        """A line if some of these images are among the training images, by the same name; a few are compared."""
        indices = sorted({index * (len(self) - 1) // (COMPARED - 1) for index in range(COMPARED)})
        both = [index for index in indices if _are_equal(self.root / self.files[index], training / self.files[index])]
        return note_on_both(len(both), len(indices), training, self.name(both[0]) if both else "")

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
        some files, those of a small set all: names such as 0.png do not tell that two classes were swapped."""
        digest = self.files.digest()
        digest.update(self.labels.data)
        firsts = np.unique(self.labels, return_index=True)[1].tolist()
        spaced = range(0, len(self.files), max(1, len(self.files) // _SAMPLED_FILES))
        for index in (*firsts[:_SAMPLED_FILES], *spaced):
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
        training: the folder of the training images, if this is another split and there is one: their classes give the
            labels.
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
    if os.path.isfile(path):
        check_no_molecules(path)
        raise UserError(
            f"{path} is a file: give a folder with a subfolder per class; unite-fast shards reads tar files"
        )
    if not os.path.isdir(path):
        raise UserError(f"no folder {path}: give one with a subfolder per class (for training, data.path=FOLDER)")
    splits = find_splits(subfolders(path))
    if not splits:
        return SplitFolder(path, training=_training_beside(path))
    name = choose_split(splits, split, path) if flat else _with_classes(path, splits, split)
    others = tuple(other for other in splits.values() if other != name)
    return SplitFolder(path / name, name, is_held_out(name), training_folder(path, splits, name), others)


def _training_beside(path: Path) -> Path | None:
    """The training images beside a folder that has the name of a held-out split: imagenet/train for imagenet/val."""
    path = path.absolute()
    if not is_held_out(path.name):
        return None
    training = training_folder(path.parent, find_splits(subfolders(path.parent)), path.name)
    return training if training is not None and subfolders(training) else None


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
            folders = [entry.name for entry in entries if _is_folder(entry)]
        return sorted(name for name in folders if not name.startswith(".") and not is_clutter(name))
    except OSError as error:
        _raise_user_error(error)


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder, or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _count_others(path: Path, reason: str, known: Collection[str], left_out: LeftOut) -> None:
    """Count what lies beside the class folders, or beside splits.

    Args:
        reason: for files, and for folders that are neither hidden nor clutter; these are classes if none are `known`.
        known: names of the splits.
    """
    try:
        with os.scandir(path) as entries:
            pairs = sorted((not _is_folder(entry), entry.name) for entry in entries)
    except OSError as error:
        _raise_user_error(error)
    for is_file, name in pairs:
        if name.startswith("."):
            left_out.add(HIDDEN, name)
        elif is_clutter(name) and not is_file:
            left_out.add(CLUTTER, name)
        elif name not in known and (known or is_file):
            left_out.add(reason, name)


def _any_in(folder: str, names: Names) -> bool:
    """Whether an image lies in the folder itself and not only in folders in it."""
    return any("/" not in name[len(folder) + 1 :] for name in names)


def one_class(classes: Sequence[str], folders: Sequence[str], place: object) -> list[str]:
    """A line if there is one class and it holds folders, which may have been meant as classes."""
    if len(classes) > 1 or not folders:
        return []
    return [
        f"all images are of one class, {classes[0]}: the folders in it ({', '.join(sorted(folders)[:3])}, ...) are no "
        f"classes; if they should be, give {os.path.join(str(place), classes[0])}"
    ]


def _are_equal(one: Path, other: Path) -> bool:
    """Whether two image files are of one size and begin with the same bytes."""
    try:
        with open_regular(one) as file, open_regular(other) as second:
            same_size = os.fstat(file.fileno()).st_size == os.fstat(second.fileno()).st_size
            return same_size and file.read(_SAMPLED_BYTES) == second.read(_SAMPLED_BYTES)
    except OSError:
        return False


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
                    elif is_clutter(entry.name) and _is_folder(entry):
                        left_out.add(CLUTTER, name)
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(name)
                        if folder == start:
                            first.append(entry.name)
                    elif entry.is_symlink() and _is_folder(entry):
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
