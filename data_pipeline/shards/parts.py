"""Notes on the files of a set that consists of parts, such as train-00000-of-00005.parquet."""

import re
from collections.abc import Sequence
from pathlib import Path

_OF = re.compile(r"(.*?)(\d{1,9})[-_]of[-_](\d{1,9})(?!\d).*")
_LAST_NUMBER = re.compile(r"(.*?)(\d{1,9})\D*")
_NAMED = 3
_MOST_PARTS = 10**6


def notes_on_parts(files: Sequence[Path], place: Path) -> list[str]:
    """A line for parts that are missing, for sets of parts beside each other, and for several folders of files. They
    may all be meant, so they are no errors.

    Args:
        files: those that are read.
        place: where they come from.
    """
    of_total: dict[tuple[Path, str, int], set[int]] = {}
    numbered: dict[tuple[Path, str], dict[int, str]] = {}
    for file in files:
        if match := _OF.fullmatch(file.stem):
            of_total.setdefault((file.parent, match[1], int(match[3])), set()).add(int(match[2]))
        elif match := _LAST_NUMBER.fullmatch(file.stem):
            numbered.setdefault((file.parent, match[1]), {})[int(match[2])] = match[2]
    notes = []
    for (_, prefix, total), found in of_total.items():
        first = int(total in found)  # the parts are 0 to total - 1, or 1 to total
        missing = total - sum(first <= number < first + total for number in found)
        if missing and total <= _MOST_PARTS:
            names = _first_missing(found, first, first + total)
            notes.append(f"WARNING: {missing:,} of {total:,} parts of {prefix}* are missing: {names}")
    for (_, prefix), found in numbered.items():
        first, last = min(found), max(found)
        missing = last - first + 1 - len(found)
        # More gaps than files are no gaps: the numbers mean something else, such as n01440764.
        if 0 < missing < len(found):
            names = _first_missing(set(found), first, last)
            start, end = f"{prefix}{found[first]}", f"{prefix}{found[last]}"
            notes.append(f"WARNING: between {start} and {end}, {missing:,} are missing: {names}")
    prefixes = [prefix for _, prefix, _ in of_total]
    if len(set(prefixes)) < len(prefixes):
        totals = sorted({total for _, prefix, total in of_total if prefixes.count(prefix) > 1})
        notes.append(
            f"WARNING: parts of several sets lie in {place} (of {', '.join(map(str, totals[:_NAMED]))}): if these hold "
            "the same images, each counts twice"
        )
    folders = sorted({file.parent for file in files})
    if len(folders) > 1:
        names = ", ".join(str(folder.relative_to(place)) for folder in folders[:_NAMED])
        notes.append(f"the files are of {len(folders)} folders, all of which are read: {names}")
    return notes


def _first_missing(found: set[int], start: int, end: int) -> str:
    """The first numbers from `start` to below `end` that are not in `found`."""
    missing = []
    for number in range(start, end):
        if number not in found:
            missing.append(str(number))
            if len(missing) > _NAMED:
                return ", ".join([*missing[:_NAMED], "..."])
    return ", ".join(missing)
