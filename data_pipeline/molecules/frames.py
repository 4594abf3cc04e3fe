"""A molecule as a file states it, its checks, and the list of what was left out."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unite_fast.data_pipeline.molecules.elements import NUMBERS, SYMBOLS
from unite_fast.data_pipeline.molecules.molecule_set import LARGEST_COORDINATE, MOST_ATOMS
from unite_fast.errors import UserError, printable, reason_of, shown
from unite_fast.utils.files import open_regular

NEAREST = 0.1
"""Angstrom. Atoms that are closer are one atom that stands twice; the shortest bond, H-H, has 0.74."""
LONGEST_LINE = 2**16
"""Bytes of a line that is read as a whole; the rest of a longer one is a line of its own."""
MOST_EXAMPLES = 10


class BrokenMolecule(Exception):
    """One molecule of a file cannot be used; the message is the reason, in a few words."""


class Frame(NamedTuple):
    """A molecule of a file.

    numbers: atomic numbers, uint8 [n].
    positions: Angstrom, float64 [n, 3].
    """

    numbers: np.ndarray
    positions: np.ndarray


@dataclass
class LeftOut:
    """What an import left out. Of many broken molecules only the first are named.

    Attributes:
        broken: number of broken molecules.
        examples: "FILE, molecule NUMBER: REASON" of the first; numbers begin at 1.
        duplicates: number of molecules that were there already.
    """

    broken: int = 0
    examples: list[str] = field(default_factory=list)
    duplicates: int = 0

    def add(self, path: Path, number: int, reason: object) -> None:
        self.broken += 1
        if len(self.examples) < MOST_EXAMPLES:
            self.examples.append(printable(f"{path}, molecule {number}: {reason}"))


def check_count(count: int) -> None:
    """Check a number of atoms, before memory is allocated.

    Raises:
        BrokenMolecule: none, or more than `MOST_ATOMS`.
    """
    if count < 1:
        raise BrokenMolecule("no atoms")
    if count > MOST_ATOMS:
        raise BrokenMolecule(f"{count} atoms, more than {MOST_ATOMS}")


def make_frame(numbers: list[int], positions: np.ndarray) -> Frame:
    """Check a molecule.

    Args:
        positions: float64 [n, 3], Angstrom.

    Raises:
        BrokenMolecule: no atoms or too many, no element, a position that is not finite, or duplicate atoms.
    """
    check_count(len(numbers))
    unknown = [number for number in numbers if not 0 < number < len(SYMBOLS)]
    if unknown:
        raise BrokenMolecule(f"no element has the number {unknown[0]}")
    if not (np.abs(positions) <= LARGEST_COORDINATE).all():  # not true for NaN either
        raise BrokenMolecule(f"a position is not finite, or beyond {LARGEST_COORDINATE:,.0f} A")
    offsets = positions[:, None] - positions
    close = np.triu((offsets * offsets).sum(-1) < NEAREST**2, 1)
    if close.any():
        first, second = np.argwhere(close)[0] + 1
        raise BrokenMolecule(f"duplicate atoms: {first} and {second} are closer than {NEAREST} A")
    return Frame(np.array(numbers, np.uint8), positions)


def parse_element(word: str) -> int:
    """The atomic number of a symbol, in upper or lower case, or of a number in digits.

    Raises:
        BrokenMolecule: neither.
    """
    number = NUMBERS.get(word) or NUMBERS.get(word.capitalize())
    if number is None and word.isascii() and word.isdecimal() and len(word) < 4:
        number = int(word)
    if number is None or not 0 < number < len(SYMBOLS):
        raise BrokenMolecule(f"{shown(word)} is no element")
    return number


class Lines:
    """The lines of a text file, one at a time, with a look at the next.

    Raises:
        UserError: the file cannot be read, or is empty.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {reason_of(error)}") from error
        self.next = self._read()
        """The next line without its end; None at the end of the file."""
        if self.next is None:
            self._file.close()
            raise UserError(f"{path} is empty: give a file with molecules, or leave it out")

    def take(self) -> str | None:
        """The next line; None at the end of the file."""
        line = self.next
        if line is not None:
            self.next = self._read()
        return line

    def _read(self) -> str | None:
        try:
            line = self._file.readline(LONGEST_LINE)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {reason_of(error)}") from error
        return line.decode(errors="replace").rstrip("\r\n") if line else None

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


def check_some(found: int, path: Path, left_out: LeftOut) -> None:
    """Check that a file had a good molecule.

    Raises:
        UserError: it had none; the message has the last reason that is known.
    """
    if not found:
        reason = f", e.g. {left_out.examples[-1]}" if left_out.examples else ""
        raise UserError(f"{path} has no molecule that can be read{reason}: repair it, or leave it out")
