"""The state of a trainer in a checkpoint, besides tensors: checked before a run resumes from it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from unite_fast.checkpoint.format import MOST_STEPS
from unite_fast.config import ATTENTION
from unite_fast.errors import UserError
from unite_fast.utils.parse_json import check_kind

Count = Annotated[int, Field(ge=0, le=MOST_STEPS)]


@dataclass
class _Averages:
    sums: Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1, max_length=100)]
    count: Count


@dataclass
class _Loader:
    batch: Count
    skipped: list[tuple[str, str]] = field(default_factory=list)


def _known_attention(name: str) -> str:
    if name not in ATTENTION:
        raise ValueError("no attention backend")
    return name


@dataclass
class _Progress:
    """Checkpoints of earlier versions lack some entries, and those of later versions have more."""

    averages: _Averages | None = None
    loader: _Loader | None = None
    decoder: Annotated[str, Field(max_length=100)] = ""
    attention: Annotated[str, AfterValidator(_known_attention)] = "sdpa"
    skipped_steps: Count = 0
    changes: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _Data:
    classes: list[tuple[str, Count]]


def class_names(progress: dict[str, Any]) -> list[str]:
    """The names of the training data's classes, in the order of the labels; empty if another version saved, and they
    are not there."""
    try:
        check_kind(_Data, progress["data"])
    except (KeyError, ValueError):
        return []
    # From the tree itself: the check shows bytes that are not text as question marks.
    return [name for name, _ in progress["data"]["classes"]]


def check_progress(progress: dict[str, Any], path: Path) -> None:
    """
    Raises:
        UserError: an entry has a value that no trainer saves.
    """
    try:
        check_kind(_Progress, progress)
    except ValueError as error:
        raise UserError(f"the progress in {path} cannot be read: {error}") from error
