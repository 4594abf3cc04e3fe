"""The input of `unite-fast shards`: image files in folders, tar files or Parquet files, listed without decoding."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unite_fast.data_pipeline.image_folder import IMAGE_EXTENSIONS, FolderSource
from unite_fast.data_pipeline.source import UnreadableSample, one_line
from unite_fast.errors import UserError
from unite_fast.utils.files import atomic_write, writing

_SPLIT_NAMES = {"train": ("train",), "test": ("val", "validation", "test")}


@dataclass(frozen=True)
class RawImages:
    """Encoded image files with labels, in a fixed order.

    Attributes:
        class_names: label i is called class_names[i].
        labels: int64 [n].
        names: name of each image for messages.
        places: file, offset and size in bytes of each image; size -1 means the whole file.
    """

    class_names: list[str]
    labels: np.ndarray
    names: list[str]
    places: list[tuple[str, int, int]]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, number: int) -> bytes:
        path, offset, size = self.places[number]
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise UnreadableSample(self.names[number], error.strerror or str(error)) from None

    def fingerprint(self) -> str:
        """A hash of class names, labels, names and sizes."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        digest.update(self.labels.tobytes())
        for name, (_, _, size) in zip(self.names, self.places, strict=True):
            digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()


def find_raw_images(path: Path, split: str, labels: Path | None, staging: Path) -> RawImages:
    """List the images at `path`.

    Args:
        path: a folder of class folders, or of train/ and val/ with class folders; a tar file or a folder of tar files,
            like ImageNet's; a folder of Parquet files, like Hugging Face's datasets.
        split: "train" or "test", if `path` has both.
        labels: a text file with the class of each image, one per line, ordered by image name. For tar files without
            classes, such as ImageNet's validation images.
        staging: a folder for copies of the images in Parquet files, whose rows cannot be read one by one.

    Raises:
        UserError: no images, or damaged files.
    """
    if path.is_file():
        listed = _from_tars([path])
    elif parquets := _of_split(sorted(path.rglob("*.parquet")), split):
        listed = _from_parquet(parquets, staging)
    elif tars := sorted(path.glob("*.tar")):
        listed = _from_tars(tars)
    else:
        folder = FolderSource(path, 0, split)
        places = [(os.path.join(folder.root, file), 0, -1) for file in folder.files]
        names = [folder.name(number) for number in range(len(folder))]
        listed = RawImages(folder.class_names, np.array(folder.labels), names, places)
    if labels is not None:
        listed = _relabelled(listed, labels)
    if not len(listed):
        raise UserError(f"no images in {path}: give a folder of class folders, tar files or Parquet files")
    return listed


def _of_split(files: list[Path], split: str) -> list[Path]:
    """The files that belong to the split by their own name or their folder's; all files if none does."""
    chosen = [
        file for file in files if file.name.startswith(_SPLIT_NAMES[split]) or file.parent.name in _SPLIT_NAMES[split]
    ]
    return chosen or files


def _from_tars(tars: list[Path]) -> RawImages:
    """An image's class is its folder in the tar file, or else the name of the tar file (n01440764.tar)."""
    entries = sorted(entry for path in tars for entry in _tar_entries(path))
    class_names = sorted({class_name for class_name, *_ in entries})
    number_of = {name: number for number, name in enumerate(class_names)}
    labels = np.array([number_of[class_name] for class_name, *_ in entries], dtype=np.int64)
    return RawImages(class_names, labels, [name for _, name, _ in entries], [place for _, _, place in entries])


def _tar_entries(path: Path) -> Iterator[tuple[str, str, tuple[str, int, int]]]:
    """Class, name and place of the images in a tar file and in tar files nested in it."""
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as outer:
            for member in outer:
                if not member.isfile():
                    continue
                if member.name.endswith(".tar"):
                    # Opened from the same file object, so its members' offsets count from the start of the outer file.
                    file.seek(member.offset_data)
                    with tarfile.open(fileobj=file, mode="r:") as inner:
                        yield from _images_of(inner, member, path)
                elif _is_image(member.name):
                    yield _entry(member, path.stem, path)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"cannot read the tar file {path} to its end: {error}; fetch it again") from None


def _images_of(inner: tarfile.TarFile, outer: tarfile.TarInfo, path: Path):
    for member in inner:
        if member.offset_data + member.size > outer.offset_data + outer.size:
            # Otherwise the read would run into the next member of the outer file.
            raise tarfile.ReadError(f"{outer.name} in it ends early")
        if member.isfile() and _is_image(member.name):
            yield _entry(member, Path(outer.name).stem, path)


def _is_image(name: str) -> bool:
    # Tar files made on a Mac hold a metadata file ._NAME for each file.
    return name.lower().endswith(IMAGE_EXTENSIONS) and not Path(name).name.startswith(".")


def _entry(member: tarfile.TarInfo, class_name: str, path: Path):
    class_name = Path(member.name).parent.name or class_name
    return class_name, f"{class_name}/{Path(member.name).name}", (str(path), member.offset_data, member.size)


def _relabelled(images: RawImages, labels: Path) -> RawImages:
    try:
        classes = labels.read_text().split()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the labels in {labels}: {error}") from None
    if len(classes) != len(images):
        raise UserError(f"{labels} has {len(classes)} lines, but there are {len(images)} images: one class per line")
    class_names = sorted(set(classes))
    number_of = {name: number for number, name in enumerate(class_names)}
    by_name = np.argsort(np.array(images.names), kind="stable").tolist()
    return RawImages(
        class_names,
        np.array([number_of[name] for name in classes], dtype=np.int64),
        [images.names[number] for number in by_name],
        [images.places[number] for number in by_name],
    )


def _from_parquet(files: list[Path], staging: Path) -> RawImages:
    """Columns `image` (bytes, or a struct with `bytes`) and `label`; class names from Hugging Face's metadata.

    A shuffle reads single rows in random order, but Parquet stores rows in groups of thousands. So the images are first
    copied to `staging`, where each has an offset.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("Parquet files need pyarrow: pip install 'unite-fast[parquet]'") from None
    with writing(staging):
        staging.mkdir(parents=True, exist_ok=True)
    class_names: list[str] = []
    labels, names, places = [], [], []
    for number, path in enumerate(files):
        try:
            with parquet.ParquetFile(path) as file:
                class_names = class_names or _class_names(file.schema_arrow.metadata or {})
                sizes, file_labels = _stage(file, staging / f"{number:05d}.bin")
        except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are ValueErrors and KeyErrors
            raise UserError(
                f"cannot read {path}: {one_line(str(error))}; it needs the columns image and label"
            ) from None
        offsets = np.cumsum([0, *sizes]).tolist()
        places += [(str(staging / f"{number:05d}.bin"), *place) for place in zip(offsets[:-1], sizes, strict=True)]
        names += [f"{path.name}:{row}" for row in range(len(sizes))]
        labels += file_labels
    class_names = class_names or [str(label) for label in range(max(labels, default=-1) + 1)]
    if labels and not 0 <= min(labels) <= max(labels) < len(class_names):
        raise UserError(
            f"the labels in {files[0].parent} are not all in 0..{len(class_names) - 1}; does this split have labels?"
        )
    return RawImages(class_names, np.array(labels, dtype=np.int64), names, places)


def _class_names(metadata: dict[bytes, bytes]) -> list[str]:
    try:
        return list(json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return []


def _stage(file, target: Path) -> tuple[list[int], list[int]]:
    """Copy a Parquet file's images to `target`, unless that exists; returns their sizes and labels."""
    done = target.exists()
    sizes, labels = [], []
    with nullcontext(os.devnull) if done else atomic_write(target) as path, open(path, "wb") as out:
        for rows in file.iter_batches(batch_size=256, columns=["image", "label"]):
            for row in rows.to_pylist():
                image = row["image"]
                data = (image["bytes"] if isinstance(image, dict) else image) or b""
                out.write(data)
                sizes.append(len(data))
                labels.append(int(row["label"]))
    return sizes, labels
