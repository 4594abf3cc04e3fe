"""XYZ files, plain and extended: a line with the number of atoms, a comment, and a line for each atom; then the next.

The comment of extended XYZ may name the columns: Properties=species:S:1:pos:R:3:charge:R:1.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from unite_fast.data_pipeline.molecules.elements import SYMBOLS
from unite_fast.data_pipeline.molecules.frames import (
    BrokenMolecule,
    Frame,
    LeftOut,
    Lines,
    check_count,
    check_some,
    make_frame,
    parse_element,
)
from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.errors import require, shown
from unite_fast.utils.files import atomic_write

COMMENT = "Properties=species:S:1:pos:R:3"
"""The comment that we write."""

_COUNT = re.compile(r"\s*\d+\s*", re.ASCII)
_PROPERTIES = re.compile(r"""(?:^|\s)Properties=(?:"([^"]*)"|(\S+))""", re.IGNORECASE)
_PLAIN = (0, 1)
"""Columns of the element and of x in plain XYZ."""


def read_xyz(path: Path, left_out: LeftOut) -> Iterator[tuple[int, Frame]]:
    """The good molecules of a file, each with its number in the file, from 1. The broken ones go into `left_out`.

    After a broken molecule, reading resumes at the next line that is a whole number. Text between molecules without a
    line of an atom, as in QM9's own files, is no molecule.

    Raises:
        UserError: the file cannot be read, is empty or has no good molecule.
    """
    number = found = 0
    with Lines(path) as lines:
        while _skip_blank(lines):
            try:
                is_molecule = bool(_COUNT.fullmatch(lines.next or ""))
                frame = _read_frame(lines)
            except BrokenMolecule as reason:
                if _skip_to_count(lines) or is_molecule:
                    number += 1
                    left_out.add(path, number, reason)
                continue
            number += 1
            found += 1
            yield number, frame
    check_some(found, path, left_out)


def _skip_blank(lines: Lines) -> bool:
    """Whether a line follows that is not blank."""
    while lines.next is not None and not lines.next.strip():
        lines.take()
    return lines.next is not None


def _skip_to_count(lines: Lines) -> bool:
    """Skip to the next count. Whether one of the skipped lines is an atom."""
    atoms = False
    while lines.next is not None and not _COUNT.fullmatch(lines.next):
        atoms = _is_atom(lines.next) or atoms
        lines.take()
    return atoms


def _is_atom(line: str) -> bool:
    try:
        _read_atom(line.split(), *_PLAIN)
    except BrokenMolecule:
        return False
    return True


def _read_frame(lines: Lines) -> Frame:
    """Read a molecule. If it is broken, its first two lines are read, and perhaps some of its atoms.

    Raises:
        BrokenMolecule: it is broken.
    """
    count, comment = lines.take() or "", lines.take() or ""
    if not _COUNT.fullmatch(count):
        raise BrokenMolecule(f"{shown(count)} is no number of atoms")
    count = int(count.strip()[:20])
    check_count(count)
    columns = _find_columns(comment)
    atoms = []
    for _ in range(count):
        if lines.next is None or len(lines.next.split()) < 4:
            raise BrokenMolecule(f"{len(atoms)} lines of atoms, and its first line says {count}")
        atoms.append(_read_atom((lines.take() or "").split(), *columns))
    if lines.next is not None and _is_atom(lines.next):
        raise BrokenMolecule(f"more lines of atoms than {count}, as its first line says")
    return make_frame([element for element, _ in atoms], np.array([position for _, position in atoms]))


def _find_columns(comment: str) -> tuple[int, int]:
    """The columns of the element and of x.

    Raises:
        BrokenMolecule: `Properties` names no such columns.
    """
    found = _PROPERTIES.search(comment)
    if not found:
        return _PLAIN
    words = (found[1] or found[2] or "").split(":")
    columns, column = {}, 0
    for name, kind, width in zip(words[::3], words[1::3], words[2::3], strict=False):
        if not (width.isascii() and width.isdecimal() and 0 < int(width[:9]) < 1000):
            break
        columns.setdefault((name.lower(), kind.upper(), int(width)), column)
        column += int(width)
    elements = [("species", "S", 1), ("species", "I", 1), ("z", "I", 1), ("numbers", "I", 1)]
    element = next((columns[name] for name in elements if name in columns), None)
    position = columns.get(("pos", "R", 3), columns.get(("positions", "R", 3)))
    if element is None or position is None:
        raise BrokenMolecule(f"its comment names no species:S:1 and pos:R:3 but {shown(':'.join(words))}")
    return element, position


def _read_atom(words: list[str], element: int, position: int) -> tuple[int, list[float]]:
    """Atomic number and position.

    Raises:
        BrokenMolecule: too few words, no element or no numbers.
    """
    if len(words) <= max(element, position + 2):
        raise BrokenMolecule("a line of an atom has too few columns")
    number = parse_element(words[element])
    try:
        return number, [float(word) for word in words[position : position + 3]]
    except ValueError:
        pass
    try:  # 1.2*^-6 is Mathematica's, as in QM9's own files
        return number, [float(word.replace("*^", "e")) for word in words[position : position + 3]]
    except ValueError as error:
        raise BrokenMolecule(f"a position is no number: {shown(' '.join(words))}") from error


def write_xyz(path: str | Path, molecules: MoleculeSet, comments: Sequence[str] | None = None) -> None:
    """Write all molecules to one extended XYZ file, with six digits after the point; a file at `path` is replaced.

    Args:
        comments: one a molecule, a line each; they follow `COMMENT`.

    Raises:
        UserError: the file cannot be written, or a comment has more than one line.
    """
    if comments is not None:
        require(len(comments) == len(molecules), f"{len(comments)} comments for {len(molecules)} molecules")
        broken = next((text for text in comments if len(text.splitlines()) > 1), None)
        require(broken is None, f"the comment {shown(broken)} has more than one line")
    with atomic_write(Path(path)) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        for row, size in enumerate(molecules.sizes.tolist()):
            comment = f"{COMMENT} {comments[row]}" if comments is not None else COMMENT
            file.write(f"{size}\n{comment}\n")
            positions = molecules.positions[row, :size].tolist()
            for number, (x, y, z) in zip(molecules.numbers[row, :size].tolist(), positions, strict=True):
                file.write(f"{SYMBOLS[number]:<2} {x:.6f} {y:.6f} {z:.6f}\n")
