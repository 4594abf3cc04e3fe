"""List the images in tar files: class folders, class tars within a tar, or WebDataset samples."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from unite_fast.data_pipeline.image_folder import IMAGE_EXTENSIONS
from unite_fast.data_pipeline.listing import (
    NO_CLASS,
    NO_SPLIT,
    OTHER_EXTENSION,
    LeftOut,
    Names,
)
from unite_fast.data_pipeline.shards.label_file import check_one_folder, read_label_file
from unite_fast.data_pipeline.shards.listed import (
    NO_LABEL,
    UNLABELLED,
    Label,
    RawImages,
    number_classes,
)
from unite_fast.data_pipeline.shards.manifest import MANIFEST, read_manifest
from unite_fast.data_pipeline.shards.tar_members import Member, open_tar, read_members
from unite_fast.data_pipeline.shards.webdataset_samples import (
    COMPANIONS,
    LABEL_KEYS,
    LARGEST_JSON,
    NoClass,
    key_of,
    label_in,
    main_image,
)
from unite_fast.data_pipeline.splits import (
    WORDS,
    check_no_splits_below,
    choose_split,
    find_splits,
    is_held_out,
    split_of_name,
    training_split,
)
from unite_fast.errors import UserError
from unite_fast.utils.files import open_regular

TWICE = "that stand twice in one tar file: the last one counts"
COPIES = "that stand in two tar files: one counts"
"""Reasons to leave a member out."""


@dataclass(slots=True)
class _Image:
    """An image in a tar file.

    Attributes:
        path: within the tar file; a tar file in it counts as a folder of its name.
        place: number of the tar file, offset and size.
        label: from WebDataset's .cls or .json.
    """

    path: str
    place: tuple[int, int, int]
    label: Label | None = None

    @property
    def key(self) -> tuple[int, str]:
        """Of the WebDataset sample: the path up to the first dot of its last part."""
        return self.place[0], key_of(self.path)


@dataclass
class _Contents:
    """What tar files hold.

    Attributes:
        labels: (number of the tar file, key) -> class, of WebDataset samples.
        companions: keys with a file that belongs to a WebDataset sample.
    """

    images: list[_Image] = field(default_factory=list)
    labels: dict[tuple[int, str], Label | NoClass] = field(default_factory=dict)
    companions: set[tuple[int, str]] = field(default_factory=set)
    left_out: LeftOut = field(default_factory=LeftOut)


def list_tars(tars: list[Path], split: str, place: Path, labels: Path | None, training: list[Path]) -> RawImages:
    """The images of a split in tar files, sorted by class and name.

    An image's class is what the .cls or .json of its WebDataset sample says; else the first folder below the split;
    else the name of its tar file (n01440764.tar).

    Args:
        tars: the tar files of the split.
        place: where they come from, for messages.
        labels: a file of classes (`read_label_file`), for tar files that hold none.
        training: tar files of the training images, if these are others: their classes give the labels.

    Raises:
        UserError: a file is damaged or compressed; the split is missing; images have no class.
    """
    contents = _scan(tars)
    images = contents.images
    labelled = any(image.key in contents.labels for image in images)
    if labelled and labels is not None:
        raise UserError(f"the tar files in {place} hold classes (.cls or .json): leave out --labels")
    if labelled:
        images = _samples(images, contents)
    elif labels is None:
        _check_labels_are_here(images, tars, contents)
        _add_tar_names(images, tars, contents)
    images, name, others = _of_split(images, split, place, contents.left_out)
    images = _without_copies(images, tars, contents.left_out)
    if labels is not None:
        check_one_folder((image.path for image in images), place)
        classes = read_label_file(labels, [PurePosixPath(image.path).name for image in images])
        for image, label in zip(images, classes, strict=True):
            image.label = label
    listed = _numbered(images, tars, place, contents.left_out)
    listed.split = name
    if training:
        listed.conform(list_tars(training, "train", place, None, []).class_names, place, training[0])
    elif others:
        listed.conform(_numbered(others, tars, place, LeftOut()).class_names, f"{name} in {place}", "train in it")
    return listed


def _scan(tars: list[Path]) -> _Contents:
    contents = _Contents()
    for number, path in enumerate(tars):
        place_of: dict[str, int] = {}
        with open_tar(path) as file:
            for member in read_members(file, path.name, contents.left_out):
                _add(contents, place_of, number, member, file)
    return contents


def _add(contents: _Contents, place_of: dict[str, int], number: int, member: Member, file: BinaryIO) -> None:
    """Sort one member into the contents: an image, a label, or left out.

    Args:
        place_of: path -> index of the image, for this tar file.
    """
    path, offset, size = member
    if path.lower().endswith(IMAGE_EXTENSIONS):
        image = _Image(path, (number, offset, size))
        if path in place_of:
            contents.left_out.add(TWICE, path)
            contents.images[place_of[path]] = image
        else:
            place_of[path] = len(contents.images)
            contents.images.append(image)
        return
    key, extension = (number, key_of(path)), path[len(key_of(path)) + 1 :].lower()
    if extension.rpartition(".")[2] in COMPANIONS:  # also x.target.cls
        contents.companions.add(key)
    if extension == "cls" or (extension == "json" and key not in contents.labels and size <= LARGEST_JSON):
        file.seek(offset)
        label = label_in(file.read(min(size, LARGEST_JSON)), extension, path)
        if label is not None:
            contents.labels[key] = label
            return
    contents.left_out.add(OTHER_EXTENSION, path)


def _samples(images: list[_Image], contents: _Contents) -> list[_Image]:
    """One image for each WebDataset sample that has a label.

    Raises:
        UserError: a label is no class.
    """
    by_key: dict[tuple[int, str], dict[str, _Image]] = {}
    for image in images:
        by_key.setdefault(image.key, {})[image.path] = image
    chosen = []
    for key, group in by_key.items():
        path = main_image(key[1], list(group), contents.left_out)
        if path is None:
            continue
        label = contents.labels.get(key)
        if isinstance(label, NoClass):
            raise UserError(f"sample {label}")
        if label is None:
            contents.left_out.add(NO_LABEL, path)
        else:
            group[path].label = label
            chosen.append(group[path])
    return chosen


def _check_labels_are_here(images: list[_Image], tars: list[Path], contents: _Contents) -> None:
    """
    Raises:
        UserError: the labels of the images are in another tar file.
    """
    keys = {key for _, key in contents.labels}
    found = next((image for image in images if image.key[1] in keys), None) if keys else None
    if found is not None:
        raise UserError(
            f"the class of {found.path} in {tars[found.place[0]]} is in another tar file: put each image "
            "and its .cls or .json into one"
        )


def _add_tar_names(images: list[_Image], tars: list[Path], contents: _Contents) -> None:
    """Put the images of a tar file without folders into a folder of its name. If a tar file has folders, images outside
    of them have no class.

    Raises:
        UserError: these are WebDataset samples without classes.
    """
    with_folders = {image.place[0] for image in images if "/" in image.path}
    kept = []
    for image in images:
        number = image.place[0]
        if "/" in image.path:
            kept.append(image)
        elif number in with_folders:
            contents.left_out.add(NO_CLASS, image.path)
        elif image.key in contents.companions:
            raise UserError(
                f"{tars[number]} holds WebDataset samples without classes, e.g. {image.path}: it needs a "
                f".cls, or a .json with one of {', '.join(LABEL_KEYS)}; or give --labels"
            )
        else:
            image.path = f"{tars[number].stem}/{image.path}"
            kept.append(image)
    images[:] = kept


def _of_split(
    images: list[_Image], split: str, place: Path, left_out: LeftOut
) -> tuple[list[_Image], str, list[_Image]]:
    """The images of the split, with paths below its folder; the name of the split, empty if there are none; and the
    training images, if these are others.

    Raises:
        NoSplit: there are splits, but not this one.
    """
    _strip_folder_of_all(images)
    splits = find_splits({image.path.partition("/")[0] for image in images if "/" in image.path})
    if not splits:
        return images, "", []
    name = choose_split(splits, split, place)
    for image in images:
        if image.path.partition("/")[0] not in splits.values():
            left_out.add(NO_SPLIT, image.path)

    def below(folder: str | None) -> list[_Image]:
        parts = [(image, *image.path.partition("/")[::2]) for image in images]
        return [_Image(rest, image.place, image.label) for image, first, rest in parts if first == folder and rest]

    training = training_split(splits)
    return below(name), name, below(training) if is_held_out(name) else []


def _strip_folder_of_all(images: list[_Image]) -> None:
    """Remove folders that hold all images, if they hold splits or only folders: the tar file is of the folder above. A
    single class stays."""
    folders = [image.path.split("/")[:-1] for image in images] or [[]]
    pairs = zip(min(folders), max(folders), strict=False)
    shared = [one for one, other in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    count = next((i for i, name in enumerate(shared) if name.lower() in WORDS), len(shared))
    if count == len(shared) and any(len(folder) == count for folder in folders):
        return
    for image in images:
        image.path = "/".join(image.path.split("/")[count:])


def _without_copies(images: list[_Image], tars: list[Path], left_out: LeftOut) -> list[_Image]:
    """Without images that stand in two tar files: same path, same bytes."""
    first_of: dict[tuple[str, int], _Image] = {}
    kept = []
    for image in images:
        first = first_of.setdefault((image.path, image.place[2]), image)
        if first is not image and _data(first, tars) == _data(image, tars):
            left_out.add(COPIES, f"{tars[image.place[0]].name}:{image.path}")
        else:
            kept.append(image)
    return kept


def _data(image: _Image, tars: list[Path]) -> bytes:
    with open_regular(tars[image.place[0]]) as file:
        file.seek(image.place[1])
        return file.read(image.place[2])


def _numbered(images: list[_Image], tars: list[Path], place: Path, left_out: LeftOut) -> RawImages:
    """The images sorted by class and path. Images without a label have the class of their first folder."""
    labelled = any(image.label is not None for image in images)
    kept: list[_Image] = []
    for image in images:
        if image.label == -1:
            left_out.add(UNLABELLED, image.path)
        elif not labelled and "/" not in image.path:
            left_out.add(NO_CLASS, image.path)
        else:
            kept.append(image)
    if images and not kept:
        raise UserError(f"the {len(images)} images in {place} have no class: give them with --labels FILE")
    if labelled:
        kept.sort(key=lambda image: (image.path, image.place))
        values = [image.label for image in kept if image.label is not None]
    else:
        # As in a folder: by class, then by the path in it.
        kept.sort(key=lambda image: (image.path.partition("/")[0], image.path, image.place))
        values = [image.path.partition("/")[0] for image in kept]
        folders_of: dict[str, set[str]] = {}
        for image in kept:
            folders_of.setdefault(image.path.partition("/")[0], set()).update(image.path.split("/")[1:-1][:1])
        for name, folders in folders_of.items():
            check_no_splits_below(name, folders, place)
        if len(set(values)) == 1 and split_of_name(values[0]):
            raise UserError(
                f"the {len(images)} images in {place} lie in one folder, whose name is no class: give --labels FILE"
            )
    names: list[str] = []
    if labelled and (place / MANIFEST).is_file():  # a set of unite-fast: it has the names of the numbers
        names = list(read_manifest(place / MANIFEST).classes)
    class_names, labels = number_classes(values, place, names)
    places = np.array([image.place for image in kept], dtype=np.int64).reshape(-1, 3)
    files = [str(path) for path in tars]
    return RawImages(class_names, labels, Names(image.path for image in kept), files, places, left_out)
