"""The parts of a generated output while it is written, so that a killed run resumes with the missing batches."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from torch import Tensor

from unite_fast.errors import UserError, require
from unite_fast.utils.file_lock import LOCK, lock_folder
from unite_fast.utils.files import PARTIAL, atomic_write, flush, read_small, writing
from unite_fast.utils.parse_json import parse_json

MANIFEST = "generation.json"
MERGED = "merged"
"""Manifest key: the result is complete; only the rename or the deletion of the parts remains."""
FORMAT = "unite_fast generation 2"
"""Increase the number when the same settings produce other images (a solver's steps, the noise, the order of samples),
so that partial output of an older version is rejected instead of resumed."""
LONGEST_MANIFEST = 2**20
"""Bytes."""


class Parts:
    """The parts of one output while it is written; base of both kinds of output.

    Attributes:
        out: the final .npz or folder.
        folder: holds the parts until they are merged.
        manifest: the settings; parts of other settings are rejected.
        labels: int64 [num], the class of each sample.
        batch: samples per batch; batch b starts at sample b * batch.
    """

    def __init__(self, out: Path, manifest: dict, labels: Tensor, batch: int):
        self.out, self.folder = out, out.with_name(out.name + ".parts")
        self.manifest = json.loads(json.dumps(manifest))
        self.labels, self.batch = labels, batch
        self.lock: TextIO | None = None

    @property
    def manifest_path(self) -> Path:
        """Where the manifest is at the end."""
        raise NotImplementedError

    def open(self) -> None:
        """Lock the folder of parts until `close`: make it, or check that it belongs to this generation.

        Raises:
            UserError: `out` exists, parts of other settings, another process is writing them, no permission.
        """
        self.check_free()
        require(not self.folder.is_symlink(), f"{self.folder} is a link; move it or choose another --out")
        self.lock = lock_folder(self.folder, "being written", "choose another --out")
        self.check_free()  # the process that held the lock may just have finished
        path = self.folder / MANIFEST
        if path.exists():
            self.check_manifest(path)
        else:
            write_manifest(path, self.manifest)

    def resume(self) -> set[int]:
        """Open, and return the numbers of the finished batches. Raises what `open` raises."""
        self.open()
        return self.finished()

    def close(self) -> None:
        if self.lock:
            self.lock.close()

    def check_free(self) -> None:
        """Check that no foreign file has a name that this generation needs.

        Raises:
            UserError: such a file exists.
        """
        empty = not self.out.suffix and self.out.is_dir() and not os.listdir(self.out)
        require(
            not self.out.exists() or empty or self.only_cleanup_left(),
            f"{self.out} already exists; choose another --out or delete it",
        )
        with writing(self.folder):
            names = os.listdir(self.folder) if self.folder.is_dir() else []
        require(
            MANIFEST in names or all(name == LOCK or name.endswith(PARTIAL) for name in names),
            f"{self.folder} is in the way: it has no {MANIFEST}; move it or choose another --out",
        )

    def only_cleanup_left(self) -> bool:
        """Whether `out` is the complete result of this generation and only its parts remain to be deleted."""
        return False

    def read_manifest(self, path: Path) -> dict:
        try:
            saved = parse_json(read_small(path, LONGEST_MANIFEST))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}; delete {self.folder} to start again") from error
        require(isinstance(saved, dict), f"{path} is not a manifest of ours; delete {self.folder} to start again")
        return saved

    def check_manifest(self, path: Path) -> None:
        saved = self.read_manifest(path)
        saved.pop(MERGED, None)
        require(
            saved.get("format") == FORMAT,
            f"{self.folder} was started by a version of unite_fast that generates other images (format "
            f"{saved.get('format')}, not {FORMAT}); choose another --out, or delete it",
        )
        for key in self.manifest | saved:
            require(
                saved.get(key) == self.manifest.get(key),
                f"{self.folder} holds parts of other samples: {key} was {saved.get(key)} and is now "
                f"{self.manifest.get(key)}; use the same settings, choose another --out, or delete it",
            )

    @property
    def batches(self) -> range:
        return range(-(-len(self.labels) // self.batch))

    def samples(self, number: int) -> range:
        """Indices of the samples in a batch."""
        return range(number * self.batch, min((number + 1) * self.batch, len(self.labels)))

    def finished(self) -> set[int]:
        """Numbers of the complete batches on disk."""
        raise NotImplementedError

    def write(self, number: int, samples: Tensor) -> None:
        """Write a batch: images uint8 [n, 3, S, S] or molecules float32 [n, T, 4].

        Raises:
            UserError: no space left, no permission.
        """
        raise NotImplementedError

    def merge(self) -> None:
        """Make `out` of the parts, which must be complete, and delete them.

        Raises:
            UserError: no space left, no permission; the parts stay.
        """
        raise NotImplementedError


class FileParts(Parts):
    """For one file. A part holds the raw bytes of its samples. While merging, parts and file together take twice the
    space.

    Attributes:
        sample_bytes: bytes of a sample in a part.
        part_suffix: of the names of parts.
    """

    sample_bytes: int
    part_suffix: str

    def bytes_of(self, samples: Tensor) -> memoryview:
        """The raw bytes of some samples."""
        raise NotImplementedError

    def write_result(self, path: Path) -> None:
        """Write the whole output from the parts."""
        raise NotImplementedError

    @property
    def manifest_path(self) -> Path:
        return self.out.with_suffix(".json")

    @property
    def merged(self) -> Path:
        """The result before it is renamed."""
        return self.folder / (self.out.name + PARTIAL)

    def only_cleanup_left(self) -> bool:
        manifest = self.folder / MANIFEST
        if not (self.out.is_file() and manifest.is_file()):
            return False
        # While the result still has its temporary name, `out` is some other file.
        return self.read_manifest(manifest).get(MERGED) is True and not self.merged.exists()

    def check_free(self) -> None:
        super().check_free()
        # An older manifest without its .npz is overwritten.
        require(
            self.out.exists() or not self.manifest_path.exists() or is_manifest(self.manifest_path),
            f"{self.manifest_path} is in the way: the manifest of {self.out.name} belongs there; move it or choose "
            "another --out",
        )

    def path(self, number: int) -> Path:
        return self.folder / f"batch_{number:08d}.{self.part_suffix}"

    def finished(self) -> set[int]:
        if self.out.exists():
            return set(self.batches)
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder) if not entry.is_symlink()}
        # A power cut may leave a file whose bytes never reached the disk.
        return {b for b in self.batches if sizes.get(self.path(b).name) == len(self.samples(b)) * self.sample_bytes}

    def write(self, number: int, samples: Tensor) -> None:
        with atomic_write(self.path(number)) as partial:
            partial.write_bytes(self.bytes_of(samples))

    def merge(self) -> None:
        if not self.only_cleanup_left():
            self.check_free()
            with writing(self.out):
                self.merged.unlink(missing_ok=True)
                self.write_result(self.merged)
            # Manifests first, so that `out` never exists without them.
            write_manifest(self.folder / MANIFEST, self.manifest | {MERGED: True})
            write_manifest(self.manifest_path, self.manifest)
            with writing(self.out):
                flush(self.merged)
                os.replace(self.merged, self.out)
                flush(self.out.parent)
        with writing(self.folder):
            # Delete the manifest last: a rerun needs it to see that `out` belongs to this generation.
            for path in self.folder.iterdir():
                if path.name not in (MANIFEST, LOCK):
                    path.unlink()
            (self.folder / MANIFEST).unlink()
            self.close()  # NFS keeps the name of an open file
            (self.folder / LOCK).unlink(missing_ok=True)
            self.folder.rmdir()

    def contents(self) -> Iterator[bytes]:
        """The parts, in order."""
        return (self.path(number).read_bytes() for number in self.batches)


def write_manifest(path: Path, manifest: dict) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(manifest, indent=1))


def is_manifest(path: Path) -> bool:
    """Whether a file is a manifest, of any format version."""
    try:
        content = parse_json(read_small(path, LONGEST_MANIFEST))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and str(content.get("format")).startswith(FORMAT.rstrip("0123456789"))
