"""The metadata of a shard set: the manifest dataset.json, and one index file per shard.

A shard is a tar file in WebDataset's layout. Each sample is two files: KEY.cls, the label in decimal digits, then the
image: an image file KEY.jpg or KEY.png, or KEY.raw, the pixels uint8 [3, s, s]. KEY is the sample's position in the
sorted listing of the original data, in twelve digits. The index has the format of NVIDIA DALI's wds2idx (v1.2): a line
"v1.2 SAMPLES", then one line per sample with extension, offset, size and name of its two files.

The manifest has the SHA-256 of each shard, of each index, and of itself. Sets of earlier versions lack the last
two; they are read as before.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from unite_fast.errors import UserError
from unite_fast.utils.files import read_small, save_text
from unite_fast.utils.parse_json import check_kind, parse_json

MANIFEST = "dataset.json"
FORMATS = ("original", "cropped-jpeg", "raw")
IMAGE_EXTENSIONS = ("jpg", "png", "raw")

_INDEX_VERSION = "v1.2"
_MOST_BYTES = 2**29
"""Of a manifest or an index; a million classes or samples take a fifth of it."""
_BLOCK = 512
"""Bytes of a header in a tar file; files start at multiples of it."""

_Count = Annotated[int, Field(ge=0, lt=2**40)]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Shard:
    # Names become paths, and arguments of shell commands for remote sets.
    name: Annotated[str, Field(pattern=r"^shard-[0-9]{5,9}\.tar$")]
    samples: _Count
    bytes: Annotated[int, Field(ge=2 * _BLOCK, lt=2**62)]
    sha256: _Sha256
    index_sha256: _Sha256 | Literal[""] = ""
    """Empty in sets of earlier versions."""


@dataclass(frozen=True)
class Manifest:
    """
    Attributes:
        format: original (the image files, unchanged), cropped-jpeg or raw.
        image_size: side of the images in pixels; 0 for original, where images are cropped when read.
        quality: JPEG quality of cropped-jpeg; 0 for the other formats.
        seed: seed of the shuffle.
        classes: class name -> number of images; label i is the i-th name.
        shards: ordered by name.
        skipped: number of broken images left out; skipped.log names them.
        checked: whether the file has its own hash; when it is read, its content then agrees.
    """

    format: Annotated[str, Field(pattern=f"^({'|'.join(FORMATS)})$")]
    image_size: Annotated[int, Field(ge=0, le=2**16)]
    quality: Annotated[int, Field(ge=0, le=100)]
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    classes: dict[str, _Count]
    shards: Annotated[list[Shard], Field(min_length=1)]
    skipped: _Count
    checked: bool = True

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def crop(self) -> str:
        return "none" if self.format == "original" else "ADM centre crop"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    tree = asdict(manifest) | {"samples": manifest.samples, "crop": manifest.crop}
    tree.pop("checked")
    save_text(json.dumps(tree | {"sha256": _own_hash(tree)}, indent=1) + "\n", folder / MANIFEST)


def _own_hash(tree: dict) -> str:
    """Of all entries but the hash, in their order: the order of the classes gives the labels."""
    return hashlib.sha256(json.dumps({key: tree[key] for key in tree if key != "sha256"}).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """
    Raises:
        UserError: the file is missing, is not a manifest, or is not what was written.
    """
    try:
        tree = parse_json(read_small(path, _MOST_BYTES))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make the set with unite-fast shards") from None
    except ValueError:
        raise UserError(f"{path} is not JSON: make the set again with unite-fast shards") from None
    try:
        return _manifest_of(tree)
    except ValueError as error:
        raise UserError(
            f"{path} is not the manifest of a shard set, or was changed ({error}): restore it, or make the set again "
            "with unite-fast shards"
        ) from None


def _manifest_of(tree: object) -> Manifest:
    """
    Raises:
        ValueError: not the content of a manifest.
    """
    if not isinstance(tree, dict):
        raise ValueError("not a mapping")
    if "sha256" in tree and tree["sha256"] != _own_hash(tree):
        raise ValueError("its hash is another one")
    manifest = check_kind(Manifest, {**tree, "checked": "sha256" in tree})
    manifest = replace(manifest, classes=tree["classes"])  # with names that are not text
    if not manifest.checked and any(shard.index_sha256 for shard in manifest.shards):
        raise ValueError("its hash is missing")  # all versions that hash indices write it
    names = Counter(shard.name for shard in manifest.shards)
    if max(names.values()) > 1:
        raise ValueError(f"it lists {max(names, key=names.__getitem__)} twice")
    if not manifest.samples == tree.get("samples") == sum(manifest.classes.values()) > 0:
        raise ValueError("the numbers of samples do not agree")
    if (manifest.image_size == 0) != (manifest.format == "original"):
        raise ValueError(f"format {manifest.format}, images of {manifest.image_size} pixels")
    return manifest


@dataclass(frozen=True)
class Index:
    """The byte ranges of a shard's samples, in the order of the tar file.

    Attributes:
        keys: int64 [n].
        labels: offset and size of each KEY.cls, int64 [n, 2].
        images: offset and size of each image, int64 [n, 2].
        extensions: extension of each image, from IMAGE_EXTENSIONS.
    """

    keys: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    extensions: list[str]

    def text(self) -> str:
        lines = [f"{_INDEX_VERSION} {len(self.keys)}"]
        columns = (self.keys.tolist(), self.labels.tolist(), self.images.tolist(), self.extensions)
        for key, label, image, extension in zip(*columns, strict=True):
            lines.append(
                f"cls {label[0]} {label[1]} {key:012d}.cls {extension} {image[0]} {image[1]} {key:012d}.{extension}"
            )
        return "\n".join(lines) + "\n"


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".idx")


def read_index(path: Path, shard: Shard | None = None) -> Index:
    """Read an index file, and check it against its shard's entry in the manifest.

    Raises:
        UserError: the file is missing, is not the index of a shard, or of another one.
    """
    try:
        content = read_small(path, _MOST_BYTES)
        index = _parse_index(content)
        if shard is not None:
            _check_index(index, content, shard)
        return index
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; restore it, or make the set again") from None
    except ValueError as error:
        raise UserError(f"{path} is not the index of its shard ({error}): restore it, or make the set again") from None


def _parse_index(content: bytes) -> Index:
    """
    Raises:
        ValueError: not the text of an index.
    """
    first, _, lines = content.partition(b"\n")
    # Without its digits, a line is one of a few texts. numpy reads the numbers that are left without the rest.
    without_digits = lines.translate(None, b"0123456789").split(b"\n")
    without_digits = without_digits[:-1] if without_digits[-1] == b"" else without_digits
    extensions = {f"cls   .cls {extension}   .{extension}".encode(): extension for extension in IMAGE_EXTENSIONS}
    if not re.fullmatch(rb"v1\.2 [0-9]{1,12}", first) or not set(without_digits) <= extensions.keys():
        raise ValueError("no lines of an index")
    # A number too large for 64 bits becomes the largest one, which is no place in a shard.
    numbers = np.fromstring(lines.translate(None, b"clsjpgnraw."), dtype=np.int64, sep=" ")
    if len(numbers) != 6 * len(without_digits) or int(first.split()[1]) != len(without_digits):
        raise ValueError("numbers are missing")
    table = numbers.reshape(-1, 6)
    if (table[:, 2] != table[:, 5]).any() or (table[:, 2] >= 10**12).any():
        raise ValueError("names of no sample")
    return Index(table[:, 2], table[:, :2], table[:, 3:5], [extensions[line] for line in without_digits])


def read_label(digits: bytes | bytearray, classes: int) -> int | None:
    """The content of KEY.cls as a label; None if it is none of so many classes."""
    label = int(digits) if digits.isdigit() and len(digits) < 19 else classes
    return label if label < classes else None


def _check_index(index: Index, content: bytes, shard: Shard) -> None:
    """
    Raises:
        ValueError: not the index of this shard.
    """
    if len(index.keys) != shard.samples:
        raise ValueError(f"it has {len(index.keys)} samples, the manifest says {shard.samples}")
    # In a tar file each file follows the one before, with a header between them.
    places = np.stack([index.labels, index.images], axis=1).reshape(-1, 2)
    outside = ((places < 0) | (places > shard.bytes)).any()
    ends = np.concatenate([[0], places.sum(axis=1)])
    if outside or (places[:, 0] < ends[:-1] + _BLOCK).any() or ends[-1] > shard.bytes:
        raise ValueError("a sample overlaps another, or leads out of the shard")
    if shard.index_sha256 and hashlib.sha256(content).hexdigest() != shard.index_sha256:
        raise ValueError("its SHA-256 is another one than in the manifest")
