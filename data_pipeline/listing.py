"""What listings of images share: many names in little memory, and what was left out."""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from unite_fast.errors import printable

MAX_NAMED = 3
"""Names per reason that `LeftOut` shows; the others are only counted."""
OTHER_EXTENSION, HIDDEN, NO_CLASS = "with another extension", "with a hidden name", "in no class folder"
LINK, NOT_REGULAR = "behind a link, which is not followed", "that are no regular files"
NO_SPLIT, CLUTTER = "that belong to no split", "of a system or a tool, such as thumbnails"
"""Reasons to leave a file or folder out."""

COMPARED = 16
"""Held-out images that are looked for among the training images."""

_CLUTTER = (
    *("__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "recycler", "system volume information"),
    *("lost+found", "__pycache__"),
)
"""Folders that archivers, file systems and storage devices make beside the user's. Those that start with a dot, such as
.ipynb_checkpoints, are hidden."""


def is_clutter(name: str) -> bool:
    """Whether a folder of this name is no class: a system or a tool made it."""
    return name.lower() in _CLUTTER


def alike(classes: Sequence[str]) -> list[str]:
    """A line if names of classes differ only in case, spaces or the encoding of accents; mostly one class was meant."""
    groups: dict[str, list[str]] = {}
    if all(name.isascii() and name.isdigit() for name in classes):  # there may be a million of them
        return []
    for name in classes:
        groups.setdefault("".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    pairs = [group for group in groups.values() if len(group) > 1]
    if not pairs:
        return []
    names = " and ".join(map(ascii, pairs[0][:2]))
    more = f", and {len(pairs) - 1} more" if len(pairs) > 1 else ""
    return [f"WARNING: the names of the classes {names}{more} look alike: is it one class?"]


def note_on_both(both: int, compared: int, training: object, first: str) -> list[str]:
    """A line if held-out images are among the training images.

    Args:
        both: how many of those that were `compared`.
        training: where these lie.
        first: name of one of them.
    """
    if not both:
        return []
    return [
        f"WARNING: {both} of {compared} images that were compared are in {training} too, first {first}: these are not "
        "held out"
    ]


class Names:
    """Names of files in two arrays.

    A list would be copied page by page into every forked reader, because reading a Python string changes its reference
    count.
    """

    def __init__(self, names: Iterable[str] = ()):
        encoded = [os.fsencode(name) for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))

    @classmethod
    def join(cls, parts: list["Names"]) -> "Names":
        """The names of all parts, in order."""
        joined = cls()
        if parts:
            joined._bytes = np.concatenate([part._bytes for part in parts])
            starts = np.cumsum([0, *(len(part._bytes) for part in parts[:-1])])
            joined._ends = np.concatenate([part._ends + start for part, start in zip(parts, starts, strict=True)])
        return joined

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        end = int(self._ends[index])  # also refuses an index out of range
        start = int(self._ends[index - 1]) if index % len(self) else 0
        return os.fsdecode(self._bytes[start:end].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def digest(self) -> "hashlib._Hash":
        """A SHA-256 of the names, to which more can be added."""
        digest = hashlib.sha256(self._bytes.data)
        digest.update(self._ends.data)
        return digest

    def take(self, order: np.ndarray) -> "Names":
        """The names in another order, or some of them."""
        return Names(self[index] for index in order.tolist())


class LeftOut:
    """Files, members and rows that a listing leaves out: how many for each reason, and the first few by name."""

    def __init__(self):
        self._reasons: dict[str, tuple[int, list[str]]] = {}

    def add(self, reason: str, name: str) -> None:
        count, names = self._reasons.get(reason, (0, []))
        if len(names) < MAX_NAMED:
            names.append(printable(name))
        self._reasons[reason] = (count + 1, names)

    def merge(self, other: "LeftOut") -> None:
        for reason, (count, names) in other._reasons.items():
            before, first = self._reasons.get(reason, (0, []))
            self._reasons[reason] = (before + count, [*first, *names][:MAX_NAMED])

    def lines(self) -> list[str]:
        """A line for each reason."""
        return [
            f"{count:,} {reason}: {', '.join(names)}{', ...' if count > len(names) else ''}"
            for reason, (count, names) in sorted(self._reasons.items())
        ]
