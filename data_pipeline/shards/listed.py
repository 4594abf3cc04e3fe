"""Encoded image files with labels: what the listings of folders, tar files and Parquet files give."""

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from unite_fast.data_pipeline.listing import COMPARED, LeftOut, Names, note_on_both
from unite_fast.data_pipeline.source import UnreadableSample
from unite_fast.data_pipeline.splits import renumber
from unite_fast.errors import UserError, printable, reason_of, shown
from unite_fast.utils.files import open_regular

MOST_CLASSES = 1_000_000
"""A larger class number is a mistake."""
LARGEST_IMAGE = 2**30
"""Bytes of an image file; a larger one is counted as broken."""
NO_LABEL, UNLABELLED = "without a label", "with the label -1, which means unlabelled"
"""Reasons to leave a sample out."""

_NUMBER = re.compile(r"[-+]?\d{1,30}(\.\d{0,30})?", re.ASCII)
_ODD_NUMBER = re.compile(
    r"[-+]*(0[xob][\da-f]+|\d+(\.\d*)?e[-+]?\d+|nan|inf|\d+|\.\d+)|\{.*\}|\[.*\]", re.ASCII | re.IGNORECASE
)
"""What programs take for a number, a list or nothing. A pandas table writes a missing value as nan."""
_OF_A_LIST = re.compile("[\\s,;_()\\[\\]{}\"']")
"""With digits and without letters: several numbers, or a number in quotes."""
_JOINERS = str.maketrans("", "", "\u200c\u200d")
"""Letters that do not show, but belong to words of some languages."""

Label = int | str
"""The number or the name of a class."""


class NoClasses(UserError):
    """The images of a split have no classes, as the test images of ImageNet."""


@dataclass
class RawImages:
    """Encoded image files with labels, in a fixed order.

    Attributes:
        class_names: label i is called class_names[i].
        labels: int64 [n].
        names: path of each image from its class folder on; a number of its row.
        files: the files that hold the images.
        places: number in `files`, offset and size in bytes of each image, int64 [n, 3]. With the size -1 an image is
            a file of its own, `names[i]` in the folder `files[0]`.
        left_out: what is not listed.
        split: name of the split in the data; empty if they have none.
        notes: what a user should know about the listing, a line each.
    """

    class_names: list[str]
    labels: np.ndarray
    names: Names
    files: list[str]
    places: np.ndarray
    left_out: LeftOut = field(default_factory=LeftOut)
    split: str = ""
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, number: int) -> str:
        """For messages."""
        return printable(self.names[number])

    def read(self, number: int) -> bytes:
        """
        Raises:
            UnreadableSample: the file is missing, unreadable, too large or not a regular file.
        """
        file, offset, size = self.places[number].tolist()
        path = self.files[file] if size >= 0 else os.path.join(self.files[file], self.names[number])
        try:
            with open_regular(path, buffering=0) as opened:
                size = size if size >= 0 else os.fstat(opened.fileno()).st_size
                if size > LARGEST_IMAGE:
                    raise UnreadableSample(self.name(number), f"{size} bytes are too many for an image")
                opened.seek(offset)
                return opened.read(size)
        except OSError as error:
            raise UnreadableSample(self.name(number), reason_of(error)) from None

    def fingerprint(self) -> str:
        """A hash of class names, labels, names and sizes."""
        digest = hashlib.sha256(repr(self.class_names).encode(errors="backslashreplace"))
        digest.update(self.labels.tobytes())
        for number, size in enumerate(self.places[:, 2].tolist()):
            digest.update(f"{self.name(number)}\0{size}\0".encode())
        return digest.hexdigest()

    def conform(self, training: Sequence[str], held_out: object, train: object) -> None:
        """Give these held-out images the labels of the training images.

        Args:
            training: names of the training classes.
            held_out, train: where both lie, for the message.

        Raises:
            ClassesDiffer: a class is not among them.
        """
        used = np.unique(self.labels)
        numbers = np.zeros(len(self.class_names), np.int64)
        numbers[used] = renumber([self.class_names[label] for label in used.tolist()], training, held_out, train)
        self.labels, self.class_names = numbers[self.labels], list(training)

    def in_both(self, training: "RawImages", place: object) -> list[str]:
        """A line if some of these held-out images are among the training images, by the same name; a few are compared.

        Args:
            place: where the training images lie.
        """
        numbers = (
            sorted({number * (len(self) - 1) // (COMPARED - 1) for number in range(COMPARED)}) if len(self) else []
        )
        wanted = {self.names[number]: number for number in numbers}
        both = []
        for other, name in enumerate(training.names):
            number = wanted.get(name)
            if number is not None and self.places[number, 2] == training.places[other, 2]:
                with suppress(UnreadableSample):
                    if self.read(number) == training.read(other):
                        both.append(number)
        return note_on_both(len(set(both)), len(numbers), place, self.name(min(both)) if both else "")


def parse_label(value: object) -> Label:
    """The class that a value from a file means: digits are a number, other text is a name; -1 means unlabelled.

    Raises:
        ValueError: neither; the message is one line.
    """
    if isinstance(value, bool):
        raise ValueError(f"the label {value} is no class: give numbers or names")
    if isinstance(value, str):
        value = value.strip()
        if _NUMBER.fullmatch(value):
            value = float(value) if "." in value else int(value)
        else:
            value = parse_name(value)
            if not _is_name(value):
                raise ValueError(f"the label {shown(value)} is no class: give a whole number in digits 0-9, or a name")
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"the label {value} is no class: give whole numbers or names")
        value = int(value)
    if not isinstance(value, (int, str)):
        raise ValueError(f"a label of the type {type(value).__name__} is no class: give numbers or names")
    if isinstance(value, int) and not -1 <= value < MOST_CLASSES:
        raise ValueError(f"the label {value} is no class: the numbers are 0 to {MOST_CLASSES - 1}")
    return value


def parse_name(value: str) -> str:
    """A name of a class, without spaces around it.

    Raises:
        ValueError: it is empty, too long or has characters that do not show; the message is one line.
    """
    name = value.strip()
    if not name:
        raise ValueError("the label is empty")
    if len(name) > 1000:
        raise ValueError(f"a label of {len(name)} characters is no class")
    if any(unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") for letter in name.translate(_JOINERS)):
        raise ValueError(f"the label {shown(name)} has control characters, so it is no text or more than one line")
    return name


def _is_name(text: str) -> bool:
    """Whether a text that is no number can be the name of a class: "1 2", "[3]", "1e3" and "nan" cannot."""
    if _ODD_NUMBER.fullmatch(text) or (len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"):
        return False
    if any(letter.isalpha() for letter in text) or not any(letter.isnumeric() for letter in text):
        return True
    return text.isascii() and not _OF_A_LIST.search(text)


def number_classes(labels: Iterable[Label], place: object, names: Sequence[str] = ()) -> tuple[list[str], np.ndarray]:
    """Class names and labels int64 [n].

    Args:
        labels: numbers of classes, or names, which are then numbered in sorted order.
        place: where they come from, for messages.
        names: names of the numbers; without them, number i is called "i".

    Raises:
        UserError: numbers and names are mixed, or a number has no name.
    """
    labels = list(labels)
    words = sorted({label for label in labels if isinstance(label, str)})
    if words:
        numbers = [label for label in labels if not isinstance(label, str)]
        if numbers:
            raise UserError(f"{place} has names of classes and numbers, e.g. {words[0]} and {numbers[0]}: use one kind")
        number_of = {name: number for number, name in enumerate(words)}
        return words, np.array([number_of[str(label)] for label in labels], dtype=np.int64)
    numbers = np.array(labels, dtype=np.int64)
    largest = int(numbers.max(initial=-1))
    names = list(names) or [str(number) for number in range(largest + 1)]
    if largest >= len(names):
        raise UserError(f"{place} has the label {largest}, but names only for 0..{len(names) - 1}")
    return names, numbers
