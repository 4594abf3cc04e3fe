"""The input of `unite-fast shards`: image files in folders, tar files or Parquet files, listed without decoding."""

import os
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import numpy as np

from unite_fast.data_pipeline.image_folder import FolderSource, find_split_folder, list_images, subfolders
from unite_fast.data_pipeline.listing import NO_SPLIT, LeftOut, alike, is_clutter
from unite_fast.data_pipeline.shards.label_file import check_one_folder, read_label_file
from unite_fast.data_pipeline.shards.listed import NoClasses, RawImages, number_classes
from unite_fast.data_pipeline.shards.parquet_files import Columns, has_labels, list_parquet
from unite_fast.data_pipeline.shards.parts import notes_on_parts
from unite_fast.data_pipeline.shards.tar_files import list_tars
from unite_fast.data_pipeline.shards.tar_members import PACKED
from unite_fast.data_pipeline.splits import (
    TEST,
    VALIDATION,
    WORDS,
    NoSplit,
    choose_split,
    find_splits,
    is_held_out,
    split_of_name,
    training_split,
    words_of,
)
from unite_fast.errors import UserError

UNLABELLED_SPLIT = "files of a split without labels"
BESIDE = "beside the files that are read"
"""Reasons to leave a file out."""


def find_raw_images(
    path: Path, split: str, labels: Path | None, staging: Path, columns: Columns | None = None
) -> RawImages:
    """List the images at `path`.

    Args:
        path: a folder of class folders, or of splits with class folders; a tar file or a folder of tar files, like
            ImageNet's or WebDataset's; a folder of Parquet files, like Hugging Face's datasets.
        split: see `splits.words_of`. Data without splits are all listed for "train".
        labels: a file with the classes of images (`label_file.read_label_file`), for a folder or tar files without
            classes, such as ImageNet's validation images.
        staging: a folder for copies of the images in Parquet files, whose rows cannot be read one by one.
        columns: the columns of Parquet files.

    Raises:
        UserError: no images; no such split; damaged files; images without classes; or an option that does not fit.
    """
    words_of(split)
    if not os.path.exists(path):
        raise UserError(f"there is no file or folder {path}")
    if not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is neither a regular file nor a folder")
    if parquets := _files(path, ".parquet", at_any_depth=True):
        listed = _of_parquet(parquets, path, split, labels, staging, columns or Columns())
    elif columns is not None:
        raise UserError(f"there are no Parquet files in {path}: leave out --image-column and --label-column")
    elif path.is_file() or (tars := _files(path, ".tar")):
        listed = _of_tars([path] if path.is_file() else tars, path, split, labels)
    elif labels is not None:
        listed = _of_flat_folder(path, split, labels)
    else:
        listed = _of_folder(path, split)
    # A file or folder may have the name of its split, such as imagenet/val.
    if is_held_out(split) and not listed.split and not is_held_out(split_of_name(path.stem)):
        raise NoSplit(f"no split {split} in {path}, which has no splits: leave out --split to read all images")
    if not len(listed):
        lines = "; ".join(listed.left_out.lines())
        why = f" (left out: {lines})" if lines else ""
        raise UserError(f"no images in {path}{why}: give a folder of class folders, tar files or Parquet files")
    if not is_held_out(split):
        listed.notes += _empty_classes(listed)
    return listed


def _empty_classes(listed: RawImages) -> list[str]:
    """A line if classes have no images: numbers of classes often have gaps, or start at 1."""
    counts = np.bincount(listed.labels, minlength=len(listed.class_names))
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return []
    hint = "; do the numbers start at 1?" if empty.tolist() == [0] else ""
    names = ", ".join(listed.class_names[label] for label in empty[:3].tolist())
    return [f"WARNING: {len(empty):,} of {len(counts):,} classes have no images, first {names}{hint}"]


def _files(path: Path, suffix: str, at_any_depth: bool = False) -> list[Path]:
    """Files with this suffix in any case: `path` itself, or those in it, or in folders of splits in it. Hidden names,
    such as a Mac's ._x.tar, and folders are left out.

    Raises:
        UserError: a folder cannot be listed.
    """
    if path.is_file():
        return [path] if path.suffix.lower() == suffix else []

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"cannot list {error.filename}: {error.strerror}; make it readable or remove it")

    def within(folder: Path) -> list[Path]:
        found = []
        for place, folders, names in os.walk(folder, onerror=refuse):
            folders[:] = [name for name in folders if at_any_depth and name[0] != "." and not is_clutter(name)]
            found += [Path(place, name) for name in names if name.lower().endswith(suffix) and name[0] != "."]
        return sorted(found)

    below = [] if at_any_depth else [path / name for name in subfolders(path) if name.lower() in WORDS]
    return within(path) or sorted(file for folder in below for file in within(folder))


def _choose_files(
    files: list[Path], place: Path, split: str, left_out: LeftOut, may_be_classes: bool = False
) -> tuple[list[Path], str, list[Path]]:
    """The files of the split by their names, or those of folders between `place` and them; the split's name, empty if
    the names are of no splits; and the files of the training images, if these are others.

    Args:
        may_be_classes: whether a name may be that of a class, such as train.tar beside tram.tar.
    """
    words = {file: _word_of(file, place) for file in files}
    splits = find_splits({word or file.stem for file, word in words.items() if word or may_be_classes})
    if not splits:
        return files, "", []
    name = choose_split(splits, split, place)
    for file, word in words.items():
        if not word:
            left_out.add(NO_SPLIT, str(file.relative_to(place)))
    training = training_split(splits) if is_held_out(name) else None
    of_training = [file for file, word in words.items() if word == training] if training else []
    return [file for file, word in words.items() if word == name], name, of_training


def _word_of(file: Path, place: Path) -> str:
    """The word for a split in a file's name, or else in the nearest folder's."""
    names = [file.stem, *(folder.name for folder in file.parents if folder != place and place in folder.parents)]
    return next((word for name in names if (word := split_of_name(name))), "")


def _of_parquet(
    files: list[Path], place: Path, split: str, labels: Path | None, staging: Path, columns: Columns
) -> RawImages:
    if labels is not None:
        raise UserError(f"the Parquet files in {place} have labels: leave out --labels, or choose --label-column")
    left_out = LeftOut()
    chosen, name, training = _choose_files(files, place, split, left_out)
    if name in TEST and not has_labels(chosen, columns):
        # The test images of ImageNet have no labels: the other held-out split is meant.
        with suppress(NoSplit):
            rest = [file for file in files if file not in chosen]
            for file in chosen:
                left_out.add(UNLABELLED_SPLIT, file.name)
            chosen, name, training = _choose_files(rest, place, split, LeftOut())
    listed = list_parquet(chosen, chosen[0] if len(chosen) == 1 else place, staging, columns, training)
    listed.split = name
    listed.left_out.merge(left_out)
    listed.notes += notes_on_parts(chosen, place)
    _count_beside(files, place, listed.left_out)
    return listed


def _count_beside(files: list[Path], place: Path, left_out: LeftOut) -> None:
    """Count what lies in `place` and is neither one of the files nor holds one."""
    if place.is_dir():
        known = {*files, *(folder for file in files for folder in file.parents)}
        for entry in sorted(place.iterdir()):
            if entry not in known:
                left_out.add(BESIDE, entry.name)


def _of_tars(tars: list[Path], place: Path, split: str, labels: Path | None) -> RawImages:
    """A test split without classes gives way to validation, as in a folder."""
    try:
        return _of_split(tars, place, split, labels)
    except NoClasses as error:
        if split.lower() not in TEST or labels is not None:
            raise
        with suppress(NoSplit):
            listed = _of_split(tars, place, VALIDATION[0], labels)
            listed.left_out.add(UNLABELLED_SPLIT, split)
            return listed
        raise error


def _of_split(tars: list[Path], place: Path, split: str, labels: Path | None) -> RawImages:
    left_out = LeftOut()
    chosen, name, training = (tars, "", []) if place.is_file() else _choose_files(tars, place, split, left_out, True)
    listed = list_tars(chosen, split, place, labels, training)
    of_splits = [tar for tar in tars if split_of_name(tar.stem)]
    others = [tar for tar in tars if tar not in of_splits]
    if not name and of_splits and others and not any(tar.stem in listed.class_names for tar in of_splits):
        raise UserError(
            f"{of_splits[0].name} in {place} has the name of a split, and {others[0].name} has not: put train, val or "
            "test into each name, or give one of them"
        )
    listed.split = listed.split or name
    listed.left_out.merge(left_out)
    listed.notes += notes_on_parts(chosen, place)
    _count_beside(tars, place, listed.left_out)
    return listed


def _of_folder(path: Path, split: str) -> RawImages:
    _check_unpacked(path)
    source = FolderSource(path, 0, split)
    labels, files, places = source.labels.astype(np.int64), [str(source.root)], _whole_files(len(source))
    left_out, notes = source.listed_left_out, list(source.notes)
    return RawImages(source.class_names, labels, source.files, files, places, left_out, source.split, notes)


def _check_unpacked(path: Path) -> None:
    """
    Raises:
        UserError: the folder holds compressed files and no folders.
    """
    packed = [] if subfolders(path) else sorted(file for file in path.iterdir() if file.suffix.lower() in PACKED)
    if packed:
        raise UserError(f"{path} holds compressed files, first {packed[0].name}: unpack them first")


def _of_flat_folder(path: Path, split: str, labels: Path) -> RawImages:
    """Images that lie in one folder, such as ImageNet's validation images, with a file of labels."""
    place, left_out = find_split_folder(path, split, flat=True), LeftOut()
    files, _ = list_images(place.root, "", left_out)
    check_one_folder(files, place.root)
    classes = read_label_file(labels, [file.rpartition("/")[2] for file in files])
    class_names, numbers = number_classes(classes, labels)
    places = _whole_files(len(files))
    listed = RawImages(class_names, numbers, files, [str(place.root)], places, left_out, place.split)
    if place.training is not None:
        listed.conform(subfolders(place.training), labels, place.training)
    listed.notes += alike(class_names)
    return listed


def _whole_files(count: int) -> np.ndarray:
    """`RawImages.places` of images that are files of their own."""
    return np.tile(np.array([0, 0, -1], np.int64), (count, 1))
