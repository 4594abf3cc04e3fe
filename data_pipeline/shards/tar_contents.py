"""What tar files hold: images, classes of WebDataset samples, and what is left out."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from unite_fast.data_pipeline.image_folder import IMAGE_EXTENSIONS
from unite_fast.data_pipeline.listing import MAX_NAMED, OTHER_EXTENSION, LeftOut
from unite_fast.data_pipeline.shards.listed import Label
from unite_fast.data_pipeline.shards.tar_members import Member, open_tar, read_members
from unite_fast.data_pipeline.shards.webdataset_samples import (
    COMPANIONS,
    LARGEST_JSON,
    NoClass,
    key_of,
    label_in,
)
from unite_fast.errors import printable

TWICE = "that stand twice in one tar file: the last one counts"
"""Reason to leave a member out."""
DIFFER = "samples have one class in .cls and another in .json; .cls counts"


@dataclass(slots=True)
class TarImage:
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
class Contents:
    """What tar files hold.

    Attributes:
        labels: (number of the tar file, key) -> class in the .cls of a WebDataset sample; once all files are read, also
            in its .json.
        of_json: the same for .json.
        companions: keys with a file that belongs to a WebDataset sample.
        dotted: keys with a class whose name has more dots, such as x.target.cls.
    """

    images: list[TarImage] = field(default_factory=list)
    labels: dict[tuple[int, str], Label | NoClass] = field(default_factory=dict)
    of_json: dict[tuple[int, str], Label | NoClass] = field(default_factory=dict)
    companions: set[tuple[int, str]] = field(default_factory=set)
    dotted: set[tuple[int, str]] = field(default_factory=set)
    left_out: LeftOut = field(default_factory=LeftOut)
    notes: list[str] = field(default_factory=list)


def read_contents(tars: list[Path]) -> Contents:
    """Read the members of tar files.

    Raises:
        UserError: a file is damaged or compressed.
    """
    contents = Contents()
    for number, path in enumerate(tars):
        place_of: dict[str, int] = {}
        with open_tar(path) as file:
            for member in read_members(file, path.name, contents.left_out):
                _add(contents, place_of, number, member, file)
    _merge_labels(contents)
    return contents


def _merge_labels(contents: Contents) -> None:
    """Add the classes of .json to those of .cls, which count if both are there. A name beside a number is no other
    class."""
    differ = []
    for key, label in contents.of_json.items():
        first = contents.labels.setdefault(key, label)
        if type(first) is type(label) and first != label:
            differ.append(key[1])
    if differ:
        contents.notes.append(f"{len(differ):,} {DIFFER}: {', '.join(map(printable, differ[:MAX_NAMED]))}")


def _add(contents: Contents, place_of: dict[str, int], number: int, member: Member, file: BinaryIO) -> None:
    """Sort one member into the contents: an image, a label, or left out.

    Args:
        place_of: path -> index of the image, for this tar file.
    """
    path, offset, size = member
    if path.lower().endswith(IMAGE_EXTENSIONS):
        image = TarImage(path, (number, offset, size))
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
        if extension.endswith(".cls"):
            contents.dotted.add(key)
    if extension == "cls" or (extension == "json" and size <= LARGEST_JSON):
        file.seek(offset)
        label = label_in(file.read(min(size, LARGEST_JSON)), extension, path)
        if label is not None:
            labels = contents.labels if extension == "cls" else contents.of_json
            if labels.setdefault(key, label) != label:
                contents.left_out.add(TWICE, path)
                labels[key] = label
            return
    contents.left_out.add(OTHER_EXTENSION, path)
