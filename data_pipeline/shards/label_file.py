"""Read the classes of images from a text file: `unite-fast shards --labels`."""

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from unite_fast.data_pipeline.shards.listed import parse_label
from unite_fast.data_pipeline.splits import ClassesDiffer
from unite_fast.errors import UserError
from unite_fast.utils.files import read_small

_LARGEST = 2**28
_OF_A_TABLE = re.compile(r"\.(jpe?g|png|webp|bmp|gif)\b", re.IGNORECASE)
"""In a line that names an image file."""
_NUMBERED = re.compile(r"\d+\s*[,;:\s]\s*\S")
_IMAGENET = re.compile(r"ILSVRC20\d\d_(val|test)_\d+\.", re.IGNORECASE)
_HEADERS = ("label", "labels", "class", "classes", "class_id", "class_name", "category", "target", "wnid", "synset")
_BOXES = "predictionstring"
"""The header of the second column in LOC_val_solution.csv: a class, then the corners of boxes."""


def read_label_file(path: Path, names: list[str]) -> list[str]:
    """The class of each image.

    Args:
        path: either one class per line, ordered by the names of the image files; or two columns separated by a comma,
            a tab or a space, the name of an image file (with its extension or without) and the class, with a line of
            headers or without. Kaggle's LOC_val_solution.csv has a class and boxes in the second column. A list is
            refused if the order of the names is not the same everywhere: 10.jpg comes before or after 2.jpg.
        names: names of the image files, without folders.

    Raises:
        UserError: the file cannot be read; an image has no class or two of them; a value is no class; a list has
            another number of lines than there are images, or is a table of other images.
        ClassesDiffer: ImageNet's images are labelled by numbers, whose order differs between the development kit and
            the sorted class names.
    """
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UserError(f"two images are called {twice}, so {path} cannot tell them apart: rename one")
    lines = _lines(path)
    by_name = _by_name(path, lines, names)
    if by_name is None:
        _check_list(path, lines, names)
        if len(lines) != len(names):
            raise UserError(f"{path} has {len(lines)} lines, but there are {len(names)} images: one class per line")
        _check_one_order(path, names)
        classes = [""] * len(names)
        for number, line in zip(np.argsort(np.array(names), kind="stable").tolist(), lines, strict=True):
            classes[number] = line
    else:
        missing = [name for name in names if name not in by_name]
        if missing:
            raise UserError(f"{path} has no class for {len(missing)} images, first {missing[0]}")
        classes = [by_name[name] for name in names]
    classes = [_class_of(path, value) for value in classes]
    _check_numbers(path, classes)
    if all(name.isdecimal() for name in classes) and all(_IMAGENET.match(name) for name in names):
        raise ClassesDiffer(
            f"{path} labels ImageNet's images by numbers such as {classes[0]}, which do not say a class, since the "
            "development kit counts in another order than sorted names: give names such as n01440764, as in "
            "LOC_val_solution.csv"
        )
    return classes


def check_one_folder(paths: Iterable[str], place: object) -> None:
    """Check that images for a label file lie in one folder; several folders would be classes.

    Args:
        paths: of the images, with "/" between folders.

    Raises:
        UserError: they do not.
    """
    folders = sorted({path.rpartition("/")[0] for path in paths})
    if len(folders) > 1:
        raise UserError(
            f"the images in {place} lie in the folders {folders[0] or '.'}, {folders[1]}, ..., "
            "which say their class: leave out --labels"
        )


def _lines(path: Path) -> list[str]:
    try:
        text = read_small(path, _LARGEST).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise UserError(f"cannot read the labels in {path}: {reason}") from None
    lines = [line.strip() for line in re.split("\r\n|\n|\r", text)]
    while lines and not lines[-1]:
        lines.pop()
    if "" in lines:
        raise UserError(f"line {lines.index('') + 1} of {path} is empty: give every image a class")
    return lines


def _by_name(path: Path, lines: list[str], names: list[str]) -> dict[str, str] | None:
    """Image name -> class; None if the file is a list of classes."""
    name_of = {name.rsplit(".", 1)[0]: name for name in names} | {name: name for name in names}
    rows = [_columns(path, line) for line in lines]
    # The first line may be a header. Images and classes may both be numbers: a list has one column.
    known = [row[0] in name_of and bool(row[1]) for row in rows]
    if not any(known[:2]) and 2 * sum(known) <= len(names):
        return None
    header = rows.pop(0) if rows[0][0] not in name_of else ["", ""]
    boxes = header[1].lower() == _BOXES
    classes: dict[str, str] = {}
    for image, value, *more in rows:
        if any(more):
            raise UserError(
                f"{path} has more than two columns at {image}: keep the image and its class, and put a "
                "class with a comma in quotes"
            )
        name = name_of.get(image)
        if name is None:  # of an image that is not here
            continue
        value = value.split()[0] if boxes and value else value
        if not value:
            raise UserError(f"{path} has no class for {image}")
        if classes.setdefault(name, value) != value:
            raise UserError(f"{path} gives {image} two classes, {classes[name]} and {value}")
    return classes


def _check_list(path: Path, lines: list[str], names: list[str]) -> None:
    """
    Raises:
        UserError: the lines are no classes: they name images, or all of them are numbered.
    """
    here = set(names)
    stems = {name.rsplit(".", 1)[0] for name in names}
    line = next((line for line in lines if _OF_A_TABLE.search(line) or line in here), None)
    line = line or next((line for line in lines if _begins_with(line, stems)), None)
    if line is None and lines and all(map(_NUMBERED.match, lines)):
        line = lines[0]
    if line is not None:
        raise UserError(
            f"the line {line[:80]} of {path} is no class, and its first column is no image of these, such "
            f"as {names[0]}: give IMAGE,CLASS in each line, or only the class"
        )
    if lines and lines[0].lower() in _HEADERS and lines.count(lines[0]) == 1:
        raise UserError(f"the first line of {path} is {lines[0]}, a header and no class: remove it")


def _begins_with(line: str, stems: set[str]) -> bool:
    """Whether a line is an image and, after a separator that is not read, something else."""
    first, *rest = re.split("[;:|]", line, maxsplit=1)
    return bool(rest) and first.strip().strip("\"'") in stems


def _check_one_order(path: Path, names: list[str]) -> None:
    """
    Raises:
        UserError: programs sort these names in several orders, so a list of classes would be ambiguous.
    """

    def as_people_do(name: str) -> list:
        parts = re.split(r"(\d+)", name.casefold(), flags=re.ASCII)
        return [int(part) if index % 2 else part for index, part in enumerate(parts)]

    for one, other in itertools.pairwise(sorted(names)):
        if as_people_do(one) > as_people_do(other):
            raise UserError(
                f"{path} is a list of classes, but in which order? Some programs put {one} before {other}, others "
                "after it: give IMAGE,CLASS in each line"
            )


def _check_numbers(path: Path, classes: list[str]) -> None:
    """
    Raises:
        UserError: two classes are one number, such as 1 and 01.
    """
    text_of: dict[int, str] = {}
    for name in set(classes):
        if name.lstrip("+").isdecimal() and text_of.setdefault(int(name), name) != name:
            raise UserError(f"{path} has the classes {text_of[int(name)]} and {name}, which are one number: write one")


def _class_of(path: Path, value: str) -> str:
    """The name of a class. A whole number with a point, as tables of floats have them, is written without it.

    Raises:
        UserError: the value is no class.
    """
    try:
        label = parse_label(value)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if label == -1:
        raise UserError(f"{path} has the label -1, which means unlabelled: leave out these images")
    return str(label) if isinstance(label, int) and "." in value else value


def _columns(path: Path, line: str) -> list[str]:
    """Two columns or more; the first is the name of an image without its folder.

    Raises:
        UserError: the line is not a row of a csv.
    """
    if "," in line:
        try:
            first, *rest = next(csv.reader([line], strict=True))
        except csv.Error as error:
            raise UserError(f"cannot read the line {line[:80]} of {path}: {error}") from None
    elif "\t" in line:
        first, *rest = line.split("\t")
    else:
        first, *rest = line.split(" ", 1)
    return [re.split(r"[/\\]", first.strip())[-1], *([value.strip() for value in rest] or [""])]
