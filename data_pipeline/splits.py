"""The names of splits and the comparison of class names: one rule for folders, tar files and Parquet files.

docs/data.md has the rule as a table.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from unite_fast.errors import UserError

TRAIN = ("train", "training")
VALIDATION = ("val", "valid", "validation", "dev", "eval")
TEST = ("test", "testing", "holdout")
WORDS = (*TRAIN, *VALIDATION, *TEST)
HELD_OUT = "held-out"
"""The split to look at during training and evaluation: validation, or else test."""


class NoSplit(UserError):
    """The data lack the split that was asked for."""


class ClassesDiffer(UserError):
    """The held-out images have a class that the training images lack, or the same classes in another order."""


def words_of(split: str) -> tuple[str, ...]:
    """The names that data may give to a split, in the order in which they are tried.

    Args:
        split: one of `WORDS` in any case, or `HELD_OUT`. "test" also finds a validation split, if nothing is called
            test; "val" does not find a test split.

    Raises:
        UserError: another word.
    """
    word = split.lower()
    if word == HELD_OUT:
        return (*VALIDATION, *TEST)
    for group in (TRAIN, VALIDATION, TEST):
        if word in group:
            return tuple(dict.fromkeys((word, *group, *(VALIDATION if group is TEST else ()))))
    raise UserError(f"unknown split {split!r}: choose one of train, val or test (or {', '.join(WORDS)})")


def is_held_out(name: str) -> bool:
    """Whether a name is a word for a held-out split; not if it is no word for a split."""
    return name.lower() in (*VALIDATION, *TEST, HELD_OUT)


def find_splits(names: Collection[str]) -> dict[str, str]:
    """Which of `names` are splits: word -> name. Empty if they are classes.

    They are splits if all of them are words for splits, or if there is training beside a held-out split. A class may be
    called "train", so a single such name among others is a class.

    Raises:
        UserError: two names differ only in case; or all names contain words for splits, or two differ only in such a
            word, such as train2017 and val2017: as classes they would mix training and held-out images.
    """
    splits: dict[str, str] = {}
    for name in sorted(names):
        word = name.lower()
        if word in WORDS and splits.setdefault(word, name) != name:
            raise UserError(f"{splits[word]} and {name} are one split: rename or remove one")
    if _are_both(splits) or len(splits) == len(names):
        return splits
    within = {name: split_of_name(name) for name in sorted(names)}
    around: dict[str, list[str]] = {}
    for name, word in within.items():
        if word:
            around.setdefault(re.sub(f"(?<![a-z]){word}(?![a-z])", "*", name.lower()), []).append(name)
    groups = [list(within), *around.values()] if all(within.values()) else around.values()
    found = next((group for group in groups if _are_both([within[name] for name in group])), None)
    if found:
        raise UserError(f"{', '.join(found[:6])} look like splits and not like classes: call them train, val and test")
    return {}


def check_no_splits_below(name: str, folders: Collection[str], place: object) -> None:
    """Check that a class folder does not hold splits: its held-out images would be trained on.

    Args:
        name: of the class folder.
        folders: names of the folders in it.
        place: where it lies, for the message.

    Raises:
        UserError: it holds training beside a held-out split.
    """
    splits = sorted(folder for folder in folders if folder.lower() in WORDS)
    if _are_both([folder.lower() for folder in splits]):
        raise UserError(
            f"the folder {name} in {place} would be a class, but holds {' and '.join(splits)}: give the "
            "folder that holds the splits, each with a folder per class"
        )


def check_no_split_is_a_class(name: str, folders: Collection[str], holds_images: bool, place: object) -> None:
    """Check that a class is not a split beside folders of other names, such as train beside extra.

    Args:
        name: of the class.
        folders: names of the folders in its folder.
        holds_images: whether there are images beside these, as in the folder of a class.
        place: where it lies, for the message.

    Raises:
        UserError: it has a word for a split as its name, and holds folders only, as a split does.
    """
    if name.lower() in WORDS and folders and not holds_images:
        raise UserError(
            f"the folder {name} in {place} looks like a split: it holds only folders, first {min(folders)}; "
            "call the folders beside it train, val or test, or move them elsewhere; if it is a class, rename it"
        )


def _are_both(words: Collection[str]) -> bool:
    """Whether there is training beside a held-out split."""
    return any(word in TRAIN for word in words) and any(word in (*VALIDATION, *TEST) for word in words)


def choose_split(splits: dict[str, str], split: str, place: object) -> str:
    """The name of `split` among the `splits` found at `place`.

    Raises:
        NoSplit: it is not there.
    """
    words = words_of(split)
    for word in words:
        if word in splits:
            return splits[word]
    names = ", ".join(splits.values())
    raise NoSplit(f"no split {' or '.join(words)} in {place}, which has {names}: add it, or choose --split")


def training_split(splits: dict[str, str]) -> str | None:
    """The name of the training split; None if there is none."""
    return next((splits[word] for word in TRAIN if word in splits), None)


def training_folder(path: Path, splits: dict[str, str], name: str) -> Path | None:
    """The folder of the training split in `path`, if `name` is a held-out split; its classes give the labels.

    Raises:
        UserError: the folder of `name` is a link to it.
    """
    training = training_split(splits)
    if training is None or not is_held_out(name):
        return None
    if (path / training).samefile(path / name):
        raise UserError(f"{path / name} is a link to {path / training}: these images are not held out; remove it")
    return path / training


def split_of_name(name: str) -> str:
    """The word for a split in the name of a file, such as imagenet-train-00000-of-00005; empty if there is none, or
    words of several splits."""
    words = [word for word in re.split("[^a-z]+", name.lower()) if word in WORDS]
    return words[0] if len(set(words)) == 1 else ""


def renumber(classes: Sequence[str], training: Sequence[str], held_out: object, train: object) -> list[int]:
    """The training label of each held-out class.

    Args:
        held_out, train: where the images are, for the message.

    Raises:
        ClassesDiffer: the training images lack a class.
    """
    number_of = {name: number for number, name in enumerate(training)}
    missing = [name for name in classes if name not in number_of]
    if missing:
        numbers = all(name.isdecimal() for name in missing) and not all(name.isdecimal() for name in training)
        hint = "numbers are not names of classes: give the names" if numbers else "remove it, or name it as there"
        first = held_out / missing[0] if isinstance(held_out, Path) else f"{missing[0]} in {held_out}"
        raise ClassesDiffer(
            f"{len(missing)} held-out classes are not among those of {train}, first {first} (there "
            f"{training[0] if training else 'none'}): {hint}"
        )
    return [number_of[name] for name in classes]


def check_same_classes(classes: Sequence[str], training: Sequence[str], held_out: object, train: object) -> None:
    """Check that label i means the same class in both.

    Raises:
        ClassesDiffer: it does not.
    """
    if list(classes) == list(training):
        return
    renumber(classes, training, held_out, train)
    raise ClassesDiffer(
        f"{held_out} has {len(classes)} classes and {train} has {len(training)}, so one label means two classes: make "
        "both from one folder, with --split"
    )
