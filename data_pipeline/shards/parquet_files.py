"""List the images in Parquet files, as in Hugging Face's datasets."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unite_fast.data_pipeline.listing import LeftOut, Names, alike
from unite_fast.data_pipeline.shards.listed import (
    NO_LABEL,
    UNLABELLED,
    Label,
    RawImages,
    number_classes,
    parse_label,
    parse_name,
)
from unite_fast.data_pipeline.splits import check_same_classes
from unite_fast.errors import UserError, reason_of
from unite_fast.utils.files import atomic_write, open_regular, writing

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "target")
NO_IMAGE = "rows without the bytes of an image"
_ROWS = 256
"""Rows read at once."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns; empty: the one of `IMAGE_COLUMNS` or `LABEL_COLUMNS` that the files have."""

    image: str = ""
    label: str = ""


@dataclass
class _Rows:
    """The rows of one file.

    Attributes:
        labels: the class of each row; None for rows that are left out.
        sizes: bytes of each row's image; 0 for rows that are left out.
    """

    labels: list[Label | None]
    sizes: list[int]


def list_parquet(
    files: list[Path], place: Path, staging: Path, columns: Columns, training: Sequence[Path] = ()
) -> RawImages:
    """The images in Parquet files, in the order of the rows.

    The image column holds bytes, or a struct with `bytes`; the label column numbers or names. Names of the numbers are
    in Hugging Face's metadata. A row whose label is null or -1, or without image bytes, is left out.

    A shuffle reads single rows in random order, but Parquet stores rows in groups of thousands. So the images are first
    copied to `staging`, where each has an offset.

    Args:
        place: where the files come from, for messages.
        training: files of the training images, if these are others: their classes give the labels.

    Raises:
        UserError: a file is damaged; a column is missing or has no images or classes; no row has a label.
    """
    with writing(staging):
        staging.mkdir(parents=True, exist_ok=True)
    left_out, staged = LeftOut(), []
    labels: list[Label] = []
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    for number, path in enumerate(files):
        staged.append(str(_staged(path, staging, number)))
        rows = _read(path, Path(staged[-1]), columns, left_out)
        offset = 0
        for row, (label, size) in enumerate(zip(rows.labels, rows.sizes, strict=True)):
            if label is not None:
                labels.append(label)
                names.append(f"{path.name}:{row}")
                places.append((number, offset, size))
            offset += size
    if not labels:
        why = "; ".join(left_out.lines()) or "no rows"
        raise UserError(f"no labelled images in {place} ({why}): this split cannot be used with classes")
    class_names, numbers = number_classes(labels, place, _class_names(files, columns))
    images = RawImages(
        class_names, numbers, Names(names), staged, np.array(places, dtype=np.int64).reshape(-1, 3), left_out
    )
    if training:
        of_training = _training_classes(training, columns)
        if _class_names(files, columns):
            check_same_classes(class_names, of_training, place, training[0])
        images.conform(of_training, place, training[0])
    images.notes += alike(class_names)
    return images


def has_labels(files: Sequence[Path], columns: Columns) -> bool:
    """Whether a row of these files has a label; files without a column of labels have none.

    Raises:
        UserError: see `list_parquet`.
    """
    for path in files:
        with _opened(path) as file:
            usual = [columns.label] if columns.label else LABEL_COLUMNS
            if not any(column in file.schema_arrow.names for column in usual):
                continue
        if any(label is not None for label in _read(path, None, columns, LeftOut()).labels):
            return True
    return False


def _training_classes(files: Sequence[Path], columns: Columns) -> list[str]:
    labels = [label for path in files for label in _read(path, None, columns, LeftOut()).labels if label is not None]
    return number_classes(labels, files[0].parent, _class_names(files, columns))[0]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile. Errors inside the `with` block become UserErrors."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError("Parquet files need pyarrow: pip install 'unite-fast[parquet]'") from None
    with (
        _reading(path),
        open_regular(path) as opened,
        parquet.ParquetFile(opened, page_checksum_verification=True) as file,
    ):
        yield file


def _batches(path: Path, file, columns: list[str]) -> Iterator[Any]:
    """Some rows at a time. Errors are those of this file, also while another one is written."""
    with _reading(path):
        yield from file.iter_batches(batch_size=_ROWS, columns=columns)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from None


def _class_names(files: Sequence[Path], columns: Columns) -> list[str]:
    """The names of the numbers in Hugging Face's metadata; empty if there are none.

    Raises:
        UserError: files have different names, or a file names a class twice.
    """
    first: list[str] | None = None
    for path in files:
        with _opened(path) as file:
            names = _names_in(file.schema_arrow.metadata or {}, _column(path, file, "label", columns.label))
        if len(set(names)) < len(names):
            raise UserError(f"{path} names a class twice in its metadata: correct the names")
        first = names if first is None else first
        if names != first:
            raise UserError(f"{path} and {files[0]} name different classes in their metadata: make a set of each")
    return first or []


def _names_in(metadata: dict[bytes, bytes], column: str) -> list[str]:
    from unite_fast.utils.parse_json import parse_json  # imports pydantic

    try:
        names = parse_json(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _column(path: Path, file, kind: str, name: str) -> str:
    """The name of the column of images or labels.

    Raises:
        UserError: it is missing, or several could be meant.
    """
    present = file.schema_arrow.names
    usual = IMAGE_COLUMNS if kind == "image" else LABEL_COLUMNS
    found = [column for column in ([name] if name else usual) if column in present]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(present)
    if found:
        raise UserError(f"{path} has the columns {' and '.join(found)}: choose one with --{kind}-column")
    raise UserError(
        f"{path} has no column {name or ' or '.join(usual[:2])}, but {listed}: it needs the columns image and "
        "label, or others that are named with --image-column and --label-column"
    )


def _check_types(path: Path, schema, image: str, label: str) -> None:
    """
    Raises:
        UserError: the columns cannot hold images or classes.
    """
    from pyarrow import types

    kind = schema.field(label).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not any(check(kind) for check in (types.is_integer, types.is_floating, types.is_string, types.is_large_string)):
        raise UserError(f"the column {label} of {path} holds {kind}, no classes: numbers or names are needed")
    kind = schema.field(image).type
    if types.is_struct(kind):
        field = next(
            (kind.field(number) for number in range(kind.num_fields) if kind.field(number).name == "bytes"), None
        )
        kind = field.type if field is not None else kind
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise UserError(f"the column {image} of {path} holds {kind}: the bytes of image files are needed")


def _staged(path: Path, staging: Path, number: int) -> Path:
    """The copy of a file's images. Its name tells whether it was made from the same file."""
    status = path.stat()
    digest = hashlib.sha256(f"{path.absolute()} {status.st_size} {status.st_mtime_ns}".encode(errors="surrogateescape"))
    return staging / f"{number:05d}-{digest.hexdigest()[:16]}.bin"


def _read(path: Path, target: Path | None, columns: Columns, left_out: LeftOut) -> _Rows:
    """Copy a Parquet file's images to `target`, unless it exists; with None, read only the labels."""
    labels: list[Label | None] = []
    sizes: list[int] = []
    with _opened(path) as file:
        image_column, label_column = (
            _column(path, file, "image", columns.image),
            _column(path, file, "label", columns.label),
        )
        _check_types(path, file.schema_arrow, image_column, label_column)
        wanted = [label_column] if target is None else [image_column, label_column]
        copy = atomic_write(target) if target is not None and not target.exists() else nullcontext(os.devnull)
        with copy as partial, open(partial, "wb") as out:
            for batch in _batches(path, file, wanted):
                for row in batch.to_pylist():
                    name = f"{path.name}:{len(labels)}"
                    label = _label_of(row[label_column], name, left_out)
                    data = b"" if target is None or label is None else _bytes_of(row[image_column])
                    if target is not None and label is not None and not data:
                        left_out.add(NO_IMAGE, name)
                        label = None
                    out.write(data)
                    sizes.append(len(data))
                    labels.append(label)
    return _Rows(labels, sizes)


def _label_of(value: object, name: str, left_out: LeftOut) -> Label | None:
    """The class of a row; None if the row is left out.

    Raises:
        UserError: the value is no class.
    """
    if value is None:
        left_out.add(NO_LABEL, name)
        return None
    try:
        label = _name(value) if isinstance(value, str) else parse_label(value)
    except ValueError as error:
        raise UserError(f"row {name}: {error}") from None
    if label == -1:
        left_out.add(UNLABELLED, name)
        return None
    return label


def _name(value: str) -> Label:
    """Text in Parquet is a name, even if it is digits: the column says that it is text. "-1" means unlabelled."""
    return -1 if value.strip() == "-1" else parse_name(value)


def _bytes_of(value: object) -> bytes:
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else b""
