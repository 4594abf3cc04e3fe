"""Open data by their kind, the setting `data.source`. `register_source` adds a kind of your own."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from unite_fast.data_pipeline.digits import open_digits
from unite_fast.data_pipeline.idx import open_idx
from unite_fast.data_pipeline.image_folder import FolderSource
from unite_fast.data_pipeline.shards.manifest import MANIFEST
from unite_fast.data_pipeline.shards.remote import RemoteShardSource, is_remote
from unite_fast.data_pipeline.shards.source import open_shards, splits_in
from unite_fast.data_pipeline.source import Source, UnreadableSample
from unite_fast.data_pipeline.splits import HELD_OUT, TEST, TRAIN, check_same_classes, words_of
from unite_fast.data_pipeline.synthetic import SyntheticSource
from unite_fast.errors import UserError
from unite_fast.utils.files import home_path


def _open_shards(path: str, image_size: int, split: str) -> Source:
    if is_remote(path):
        source = RemoteShardSource(path, image_size)
        source.held_out = False  # an address names one set, which serves as every split
        return source
    return open_shards(home_path(path), image_size, split)


@dataclass(frozen=True)
class _Kind:
    """
    Attributes:
        open: (path, image size in pixels, split, number of classes) -> the source. Only synthetic uses the last.
        needs_path: whether the data lie at a path; if not, `open` gets "".
        image_size: the size to open with if the caller gives 0.
        any_split: whether `open` takes every word for a split; if not, only "train" and "test".
    """

    open: Callable[[str, int, str, int], Source]
    needs_path: bool
    image_size: int
    any_split: bool = False


def _open_folder(path: str, image_size: int, split: str) -> Source:
    return FolderSource(home_path(path), image_size, split)


_KINDS = {
    "digits": _Kind(lambda path, size, split, classes: open_digits(size, split), False, 8),
    "folder": _Kind(lambda path, size, split, classes: _open_folder(path, size, split), True, 256, any_split=True),
    "idx": _Kind(lambda path, size, split, classes: open_idx(home_path(path), size, split), True, 32),
    # 0: the shards' own size
    "shards": _Kind(lambda path, size, split, classes: _open_shards(path, size, split), True, 0, any_split=True),
    "synthetic": _Kind(lambda path, size, split, classes: SyntheticSource(size, split, classes), False, 256),
}


def register_source(
    kind: str, open: Callable[[str, int, str], Source], needs_path: bool = True, image_size: int = 256
) -> None:
    """Make a source of your own available as `data.source=KIND`, in this process. See docs/adding-a-dataset.md.

    Args:
        kind: its name.
        open: called as open(path, image_size, split), split "train" or "test"; returns the source.
        needs_path: whether `data.path` must be set. If not, it must be empty, and `open` gets "" as its path.
        image_size: the side in pixels that `unite-fast inspect` and `stats` use if none is given.

    Raises:
        ValueError: the name is taken.
    """
    if kind in _KINDS:
        raise ValueError(f"there is a source called {kind} already: choose another name")
    _KINDS[kind] = _Kind(lambda path, size, split, classes: open(path, size, split), needs_path, image_size)


def open_source(kind: str, path: str | None, image_size: int, split: str, num_classes: int = 1000) -> Source:
    """Open the data of one split.

    Args:
        kind: "digits" (scikit-learn's), "folder" (one subfolder per class), "idx" (MNIST's file format), "shards" (made
            by unite-fast shards), "synthetic" (noise, for timing), or a registered kind. `detect_source` finds the
            kind of given data.
        path: folder of the data, in which a leading ~ means the home folder; None or "" for kinds without a path. For
            shards also an address: https://..., or pipe:COMMAND with {} in place of a file's name. An address names one
            set, which serves as both splits.
        image_size: side of the images in pixels; 0 uses the size of the images in shards, 8 for digits, 32 for IDX
            files, 256 for others.
        split: "train", or a held-out split: "test", for folders and shards also "val" and other words of
            `splits.words_of`, and `splits.HELD_OUT`: validation, or else test.
        num_classes: classes of the synthetic images; other data define their own.

    Raises:
        UserError: unknown kind or split; a path that is missing, or given to a kind without one; faulty data.
    """
    if kind not in _KINDS:
        raise UserError(
            f"unknown data.source {kind!r}: choose one of {', '.join(sorted(_KINDS))}, or register it (register_source)"
        )
    opener = _KINDS[kind]
    if not opener.any_split:
        split = _train_or_test(kind, split)
    words_of(split)
    if path and not opener.needs_path:
        raise UserError(
            f"data.source {kind} reads no files, but data.path is {path}: leave data.path out, "
            "or set data.source to the kind of data there"
        )
    if opener.needs_path and not path:
        raise UserError(f"data.source {kind} needs data.path: the folder that holds the data")
    source = opener.open(path or "", image_size or opener.image_size, split, num_classes)
    if not opener.any_split:
        source.split = split
    return source


def _train_or_test(kind: str, split: str) -> str:
    if split in TRAIN:
        return "train"
    if split in (*TEST, HELD_OUT):
        return "test"
    raise UserError(f"unknown split {split!r}: choose train or test, the splits of data.source {kind}")


def open_held_out(kind: str, path: str | None, image_size: int, num_classes: int = 1000) -> tuple[Source, bool]:
    """Open the held-out images of some data: validation, or else test. The arguments are those of `open_source`.

    Returns:
        The source, and whether its images are held out: data without splits give all their images.

    Raises:
        ClassesDiffer: the classes are not those of the training images.
        UserError: see `open_source`.
    """
    source = open_source(kind, path, image_size, HELD_OUT, num_classes)
    if source.held_out is not None:
        return source, source.held_out
    training = open_source(kind, path, image_size, "train", num_classes)
    check_same_classes(source.class_names, training.class_names, f"the test split of {kind}", "its training split")
    return source, not _same_images(source, training)


def _same_images(one: Source, other: Source) -> bool:
    """Whether two sources seem to be the same images: as many of them, and a few that are equal."""
    if len(one) != len(other):
        return False
    for index in sorted({0, len(one) // 2, len(one) - 1}):
        try:
            if not one.read([index])[0].equal(other.read([index])[0]):
                return False
        except UnreadableSample:
            continue
    return True


def detect_source(data: str) -> tuple[str, str]:
    """Find the kind of some data: the values of `data.source` and `data.path` that open them.

    Args:
        data: the address of shards, a folder (of shards, IDX files or class folders), or the name of a kind that needs
            no path, such as "digits". Write ./digits for a folder of that name.
    """
    if data in _KINDS and not _KINDS[data].needs_path:
        return data, ""
    folder = home_path(data)
    if is_remote(data) or os.path.isfile(folder / MANIFEST) or splits_in(folder):
        return "shards", data
    return "idx" if os.path.isdir(folder) and any(folder.glob("*-ubyte*")) else "folder", data
