"""List the images in tar files: class folders, class tars within a tar, or WebDataset samples."""

import itertools
from pathlib import Path, PurePosixPath

import numpy as np

from unite_fast.data_pipeline.image_folder import one_class
from unite_fast.data_pipeline.listing import (
    NO_CLASS,
    NO_SPLIT,
    LeftOut,
    Names,
    alike,
)
from unite_fast.data_pipeline.shards.label_file import check_one_folder, read_label_file
from unite_fast.data_pipeline.shards.listed import (
    NO_LABEL,
    UNLABELLED,
    NoClasses,
    RawImages,
    number_classes,
)
from unite_fast.data_pipeline.shards.manifest import MANIFEST, read_manifest
from unite_fast.data_pipeline.shards.tar_contents import Contents, TarImage, read_contents
from unite_fast.data_pipeline.shards.webdataset_samples import LABEL_KEYS, NoClass, main_image
from unite_fast.data_pipeline.splits import (
    WORDS,
    check_no_split_is_a_class,
    check_no_splits_below,
    choose_split,
    find_splits,
    is_held_out,
    split_of_name,
    training_split,
)
from unite_fast.errors import UserError
from unite_fast.utils.files import open_regular

COPIES = "that stand in two tar files: one counts"
NO_IMAGE = "with the class of no image"
"""Reasons to leave a member out."""


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
    contents = read_contents(tars)
    images = contents.images
    labelled = any(image.key in contents.labels for image in images)
    if labelled and labels is not None:
        raise UserError(f"the tar files in {place} hold classes (.cls or .json): leave out --labels")
    if labelled:
        images = _samples(images, tars, contents)
    elif labels is None:
        _check_labels_are_here(images, tars, contents)
        _add_tar_names(images, tars, contents)
    around = _strip_folder_of_all(images)
    images, name, others = _of_split(images, split, place, contents.left_out)
    if around and not name and not labelled and labels is None:
        contents.notes.append(f"all images lie in the folder {around}, so the folders in it are the classes")
    images = _without_copies(images, tars, contents.left_out)
    if labels is not None:
        check_one_folder((image.path for image in images), place)
        classes = read_label_file(labels, [PurePosixPath(image.path).name for image in images])
        for image, label in zip(images, classes, strict=True):
            image.label = label
    listed = _numbered(images, tars, place, contents.left_out)
    listed.split, listed.notes = name, contents.notes + listed.notes
    if len(listed.class_names) == 1 and len(tars) > 1 and not labelled and labels is None:
        listed.notes.append(
            f"all images of {len(tars)} tar files are of one class, {listed.class_names[0]}, their folder"
        )
    if training:
        _compare(listed, list_tars(training, "train", place, None, []), place, training[0])
    elif others:
        _compare(listed, _numbered(others, tars, place, LeftOut()), f"{name} in {place}", "train in it")
    return listed


def _compare(listed: RawImages, training: RawImages, held_out: object, place: object) -> None:
    """Compare held-out images with the training images in `place`, whose labels they get."""
    listed.conform(training.class_names, held_out, place)
    listed.notes += listed.in_both(training, place)


def _samples(images: list[TarImage], tars: list[Path], contents: Contents) -> list[TarImage]:
    """One image for each WebDataset sample that has a label.

    Raises:
        UserError: a label is no class; or most images lie in class folders and only a few have a label.
    """
    by_key: dict[tuple[int, str], dict[str, TarImage]] = {}
    for image in images:
        by_key.setdefault(image.key, {})[image.path] = image
    for key in contents.labels:
        if key not in by_key and key not in contents.of_json:
            contents.left_out.add(NO_IMAGE, f"{tars[key[0]].name}:{key[1]}.cls")
    plain = [key for key in by_key if "/" in key[1] and key not in contents.labels and key not in contents.companions]
    if len(plain) > len(by_key) // 2:
        number, path = plain[0]
        one = next(key for key in by_key if key in contents.labels)[1]
        raise UserError(
            f"{one} in {tars[number]} has a class in a .cls or .json, but {len(plain)} images such as {path} have "
            "only folders: remove one kind of class"
        )
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


def _check_labels_are_here(images: list[TarImage], tars: list[Path], contents: Contents) -> None:
    """
    Raises:
        UserError: the labels of the images are in another tar file, or under other names.
    """
    keys = {key for _, key in contents.labels}
    found = next((image for image in images if image.key[1] in keys), None) if keys else None
    if found is not None:
        raise UserError(
            f"the class of {found.path} in {tars[found.place[0]]} is in another tar file: put each image "
            "and its .cls or .json into one"
        )
    lonely = next((key for key in contents.labels if key not in contents.of_json), None)
    lonely = lonely or next((image.key for image in images if image.key in contents.dotted and "/" in image.path), None)
    if lonely is not None:
        raise UserError(
            f"{tars[lonely[0]]} holds a class for {lonely[1]} (.cls), but no image of that name: both need one name up "
            "to its first dot, such as x.jpg and x.cls; or give --labels"
        )


def _add_tar_names(images: list[TarImage], tars: list[Path], contents: Contents) -> None:
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
    images: list[TarImage], split: str, place: Path, left_out: LeftOut
) -> tuple[list[TarImage], str, list[TarImage]]:
    """The images of the split, with paths below its folder; the name of the split, empty if there are none; and the
    training images, if these are others.

    Raises:
        NoSplit: there are splits, but not this one.
    """
    splits = find_splits({image.path.partition("/")[0] for image in images if "/" in image.path})
    if not splits:
        return images, "", []
    name = choose_split(splits, split, place)
    for image in images:
        if image.path.partition("/")[0] not in splits.values():
            left_out.add(NO_SPLIT, image.path)

    def below(folder: str | None) -> list[TarImage]:
        parts = [(image, *image.path.partition("/")[::2]) for image in images]
        return [TarImage(rest, image.place, image.label) for image, first, rest in parts if first == folder and rest]

    training = training_split(splits)
    return below(name), name, below(training) if is_held_out(name) else []


def _strip_folder_of_all(images: list[TarImage]) -> str:
    """Remove folders that hold all images, if they hold splits or only folders: the tar file is of the folder above. A
    single class stays. Returns what was removed."""
    folders = [image.path.split("/")[:-1] for image in images] or [[]]
    pairs = zip(min(folders), max(folders), strict=False)
    shared = [one for one, other in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    count = next((i for i, name in enumerate(shared) if name.lower() in WORDS), len(shared))
    if count == len(shared) and any(len(folder) == count for folder in folders):
        return ""
    for image in images:
        image.path = "/".join(image.path.split("/")[count:])
    return "/".join(shared[:count])


def _without_copies(images: list[TarImage], tars: list[Path], left_out: LeftOut) -> list[TarImage]:
    """Without images that stand in two tar files: same path, same bytes.

    Raises:
        UserError: they have two classes.
    """
    first_of: dict[tuple[str, int], TarImage] = {}
    kept = []
    for image in images:
        first = first_of.setdefault((image.path, image.place[2]), image)
        if first is not image and _data(first, tars) == _data(image, tars):
            if first.label != image.label:
                one, other = tars[first.place[0]].name, tars[image.place[0]].name
                raise UserError(
                    f"the image {image.path} has the class {first.label} in {one} and {image.label} in {other}: remove "
                    "one"
                )
            left_out.add(COPIES, f"{tars[image.place[0]].name}:{image.path}")
        else:
            kept.append(image)
    return kept


def _data(image: TarImage, tars: list[Path]) -> bytes:
    with open_regular(tars[image.place[0]]) as file:
        file.seek(image.place[1])
        return file.read(image.place[2])


def _numbered(images: list[TarImage], tars: list[Path], place: Path, left_out: LeftOut) -> RawImages:
    """The images sorted by class and path. Images without a label have the class of their first folder."""
    labelled = any(image.label is not None for image in images)
    kept: list[TarImage] = []
    notes: list[str] = []
    for image in images:
        if image.label == -1:
            left_out.add(UNLABELLED, image.path)
        elif not labelled and "/" not in image.path:
            left_out.add(NO_CLASS, image.path)
        else:
            kept.append(image)
    if images and not kept:
        raise NoClasses(f"the {len(images)} images in {place} have no class: give them with --labels FILE")
    if labelled:
        kept.sort(key=lambda image: (image.path, image.place))
        values = [image.label for image in kept if image.label is not None]
    else:
        # As in a folder: by class, then by the path in it.
        kept.sort(key=lambda image: (image.path.partition("/")[0], image.path, image.place))
        values = [image.path.partition("/")[0] for image in kept]
        notes = _check_folders(kept, place)
        if len(set(values)) == 1 and split_of_name(values[0]):
            raise NoClasses(
                f"the {len(images)} images in {place} lie in one folder, whose name is no class: give --labels FILE"
            )
    names: list[str] = []
    if labelled and (place / MANIFEST).is_file():  # a set of unite-fast: it has the names of the numbers
        names = list(read_manifest(place / MANIFEST).classes)
    class_names, labels = number_classes(values, place, names)
    places = np.array([image.place for image in kept], dtype=np.int64).reshape(-1, 3)
    files = [str(path) for path in tars]
    paths = Names(image.path for image in kept)
    return RawImages(class_names, labels, paths, files, places, left_out, notes=notes + alike(class_names))


def _check_folders(images: list[TarImage], place: Path) -> list[str]:
    """Check that the first folders are classes; returns a line if there is one class with folders in it.

    Raises:
        UserError: one looks like a split, or holds splits.
    """
    folders_of: dict[str, set[str]] = {}
    for image in images:
        name, *folders = image.path.split("/")[:-1]
        folders_of.setdefault(name, set()).add(folders[0] if folders else "")
    for name, folders in folders_of.items():
        check_no_splits_below(name, folders, place)
        if len(folders_of) > 1:
            check_no_split_is_a_class(name, folders - {""}, "" in folders, place)
    names = list(folders_of)
    return one_class(names, sorted(folders_of[names[0]] - {""}), place) if len(names) == 1 else []
