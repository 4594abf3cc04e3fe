"""Open data by their kind, the setting `data.source`. `register_source` adds a kind of your own."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from unite_fast.data_pipeline.digits import open_digits
from unite_fast.data_pipeline.idx import open_idx
from unite_fast.data_pipeline.image_folder import FolderSource
from unite_fast.data_pipeline.shards.manifest import MANIFEST
from unite_fast.data_pipeline.shards.remote import RemoteShardSource, is_remote
from unite_fast.data_pipeline.shards.source import ShardSource, split_folder
from unite_fast.data_pipeline.source import Source
from unite_fast.data_pipeline.synthetic import SyntheticSource
from unite_fast.errors import UserError

SPLITS = ("train", "test")


def _open_shards(path: str, image_size: int, split: str) -> Source:
    if is_remote(path):
        return RemoteShardSource(path, image_size)
    return ShardSource(split_folder(Path(path).expanduser(), split), image_size)


@dataclass(frozen=True)
class _Kind:
    """
    Attributes:
        open: (path, image size in pixels, split, number of classes) -> the source. Only synthetic uses the last.
        needs_path: whether the data lie at a path; if not, `open` gets "".
        image_size: the size to open with if the caller gives 0.
    """

    open: Callable[[str, int, str, int], Source]
    needs_path: bool
    image_size: int


_KINDS = {
    "digits": _Kind(lambda path, size, split, classes: open_digits(size, split), False, 8),
    "folder": _Kind(lambda path, size, split, classes: FolderSource(Path(path).expanduser(), size, split), True, 256),
    "idx": _Kind(lambda path, size, split, classes: open_idx(Path(path).expanduser(), size, split), True, 32),
    "shards": _Kind(lambda path, size, split, classes: _open_shards(path, size, split), True, 0),  # 0: the shards' own
    "synthetic": _Kind(lambda path, size, split, classes: SyntheticSource(size, split, classes), False, 256),
}


def register_source(
    kind: str, open: Callable[[str, int, str], Source], needs_path: bool = True, image_size: int = 256
) -> None:
    """Make a source of your own available as `data.source=KIND`, in this process. See docs/adding-a-dataset.md.

    Args:
        kind: its name.
        open: called as open(path, image_size, split), split "train" or "test"; returns the source.
        needs_path: whether `data.path` must be set. If not, it must be empty, and `open` gets "" as its path.
        image_size: the side in pixels that `unite-fast inspect` and `stats` use if none is given.

    Raises:
        ValueError: the name is taken.
    """
    if kind in _KINDS:
        raise ValueError(f"there is a source called {kind} already: choose another name")
    _KINDS[kind] = _Kind(lambda path, size, split, classes: open(path, size, split), needs_path, image_size)


def open_source(kind: str, path: str | None, image_size: int, split: str, num_classes: int = 1000) -> Source:
    """Open the data of one split.

    Args:
        kind: "digits" (scikit-learn's), "folder" (one subfolder per class), "idx" (MNIST's file format), "shards" (made
            by unite-fast shards), "synthetic" (noise, for timing), or a registered kind. `detect_source` finds the
            kind of given data.
        path: folder of the data, in which a leading ~ means the home folder; None or "" for kinds without a path. For
            shards also an address: https://..., or pipe:COMMAND with {} in place of a file's name. An address names one
            set, which serves as both splits.
        image_size: side of the images in pixels; 0 uses the size of the images in shards, 8 for digits, 32 for IDX
            files, 256 for others.
        split: "train" or "test".
        num_classes: classes of the synthetic images; other data define their own.

    Raises:
        UserError: unknown kind or split; a path that is missing, or given to a kind without one; faulty data.
    """
    if kind not in _KINDS:
        raise UserError(
            f"unknown data.source {kind!r}: choose one of {', '.join(sorted(_KINDS))}, or register it (register_source)"
        )
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    opener = _KINDS[kind]
    if path and not opener.needs_path:
        raise UserError(
            f"data.source {kind} reads no files, but data.path is {path}: leave data.path out, "
            "or set data.source to the kind of data there"
        )
    if opener.needs_path and not path:
        raise UserError(f"data.source {kind} needs data.path: the folder that holds the data")
    return opener.open(path or "", image_size or opener.image_size, split, num_classes)


def detect_source(data: str) -> tuple[str, str]:
    """Find the kind of some data: the values of `data.source` and `data.path` that open them.

    Args:
        data: the address of shards, a folder (of shards, IDX files or class folders), or the name of a kind that needs
            no path, such as "digits". Write ./digits for a folder of that name.
    """
    if data in _KINDS and not _KINDS[data].needs_path:
        return data, ""
    folder = Path(data).expanduser()
    if is_remote(data) or any((folder / name / MANIFEST).is_file() for name in (".", "train", "val", "test")):
        return "shards", data
    return "idx" if any(folder.glob("*-ubyte*")) else "folder", data
