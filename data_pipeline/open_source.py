"""The kinds of data by name."""

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

KINDS = ("digits", "folder", "idx", "shards", "synthetic")
SPLITS = ("train", "test")


def open_source(kind: str, path: str | None, image_size: int, split: str, num_classes: int = 1000) -> Source:
    """Open data by its kind.

    Args:
        kind: "digits" (scikit-learn's), "folder" (one subfolder a class), "idx" (MNIST's file format), "shards" (made
            by unite-fast shards) or "synthetic" (noise, for timing).
        path: the folder of the data, where a leading ~ is the home folder; None or "" for the digits and synthetic
            images. For shards also an address, which then names one set, its own test split: https://..., or
            pipe:COMMAND with {} in the place of a file's name.
        image_size: side in pixels of the images handed out.
        split: "train" or "test".
        num_classes: of synthetic images; other data have the classes that they have.

    Raises:
        UserError: an unknown kind or split, a path that is missing or not wanted, or whatever is wrong with the data.
    """
    if kind not in KINDS:
        raise UserError(f"unknown data.source {kind!r}: choose one of {', '.join(KINDS)}")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if kind == "digits":
        if path:
            raise UserError(
                f"the digits have no data.path (it is {path}): leave it out, or set data.source to what is there"
            )
        return open_digits(image_size, split)
    if kind == "synthetic":
        if path:
            raise UserError(
                f"synthetic images have no data.path (it is {path}): leave it out, or set data.source to what is there"
            )
        return SyntheticSource(image_size, split, num_classes)
    if not path:
        raise UserError(f"data.source {kind} needs data.path: the folder that holds the data")
    if kind == "shards" and is_remote(path):
        return RemoteShardSource(path, image_size)
    folder = Path(path).expanduser()
    if kind == "shards":
        return ShardSource(split_folder(folder, split), image_size)
    return FolderSource(folder, image_size, split) if kind == "folder" else open_idx(folder, image_size, split)


def open_data(path: str, image_size: int, split: str) -> tuple[str, Source]:
    """The kind of data found at `path`, and its source.

    Args:
        path: "digits", or the folder or address of shards, a folder of IDX files or one of class folders.
        image_size: 0 takes the size that shards of cropped images have, 8 for digits, 32 for IDX files, 256 elsewhere.
    """
    if path == "digits":
        return "digits", open_source("digits", None, image_size or 8, split)
    folder = Path(path).expanduser()
    if is_remote(path) or any((folder / name / MANIFEST).is_file() for name in (".", "train", "val", "test")):
        return "shards", open_source("shards", path, image_size, split)
    if any(folder.glob("*-ubyte*")):
        return "idx", open_source("idx", path, image_size or 32, split)
    return "folder", open_source("folder", path, image_size or 256, split)
