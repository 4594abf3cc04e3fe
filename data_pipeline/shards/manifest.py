"""The metadata of a shard set: the manifest dataset.json, and one index file per shard.

A shard is a tar file in WebDataset's layout. Each sample is two files: KEY.cls, the label in decimal digits, then the
image: an image file KEY.jpg or KEY.png, or KEY.raw, the pixels uint8 [3, s, s]. KEY is the sample's position in the
sorted listing of the original data, in twelve digits. The index has the format of NVIDIA DALI's wds2idx (v1.2): a line
"v1.2 SAMPLES", then one line per sample with extension, offset, size and name of its two files.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from unite_fast.errors import UserError
from unite_fast.utils.files import save_text

MANIFEST = "dataset.json"
FORMATS = ("original", "cropped-jpeg", "raw")
IMAGE_EXTENSIONS = ("jpg", "png", "raw")

_INDEX_VERSION = "v1.2"
_SHARD_NAME = re.compile(r"shard-\d{5}\.tar")


@dataclass(frozen=True)
class Shard:
    name: str
    samples: int
    bytes: int
    sha256: str


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
    """

    format: str
    image_size: int
    quality: int
    seed: int
    classes: dict[str, int]
    shards: list[Shard]
    skipped: int

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def crop(self) -> str:
        return "none" if self.format == "original" else "ADM centre crop"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    tree = asdict(manifest) | {"samples": manifest.samples, "crop": manifest.crop}
    save_text(json.dumps(tree, indent=1) + "\n", folder / MANIFEST)


def read_manifest(path: Path) -> Manifest:
    """
    Raises:
        UserError: the file is missing or is not a manifest.
    """
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make the set with unite-fast shards") from None
    except ValueError:
        raise UserError(f"{path} is not JSON: make the set again with unite-fast shards") from None
    try:
        shards = [Shard(**entry) for entry in tree["shards"]]
        fields = {name: tree[name] for name in ("format", "image_size", "quality", "seed", "classes", "skipped")}
        manifest = Manifest(**fields, shards=shards)
        valid = (
            manifest.format in FORMATS
            and manifest.samples == tree["samples"] == sum(manifest.classes.values()) > 0
            # Names become paths, and arguments of shell commands for remote sets.
            and all(_SHARD_NAME.fullmatch(shard.name) for shard in shards)
        )
    except (TypeError, KeyError, AttributeError):
        valid = False
    if not valid:
        raise UserError(f"{path} is not the manifest of a shard set: make the set again with unite-fast shards")
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


def read_index(path: Path) -> Index:
    """
    Raises:
        UserError: the file is missing or is not the index of a shard.
    """
    try:
        version, count, *words = path.read_text().split()
        table = np.array(words, dtype=str).reshape(int(count), 8)
        if version == _INDEX_VERSION and (table[:, 0] == "cls").all() and np.isin(table[:, 4], IMAGE_EXTENSIONS).all():
            keys = table[:, 3].astype("U12")  # without ".cls"
            numbers = np.column_stack([keys, table[:, [1, 2, 5, 6]]]).astype(np.int64)
            return Index(numbers[:, 0], numbers[:, 1:3], numbers[:, 3:5], table[:, 4].tolist())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; restore it, or make the set again") from None
    except ValueError:
        pass
    raise UserError(f"{path} is not the index of a shard: restore it, or make the set again")
