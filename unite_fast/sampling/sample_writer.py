"""Write many samples to files: parts while sampling runs, then one .npz or a folder of PNGs. Resumable.

While sampling runs, the folder OUT.parts holds the manifest `generation.json` (all settings) and the finished batches.
Files are written to a temporary name and renamed, so a file with its final name is complete, and a killed run resumes
with the missing batches. At the end the manifest is in the folder of PNGs, or next to the .npz under its name:
samples.json for samples.npz.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unite_fast.distributed.process_group import ALONE, Ranks
from unite_fast.errors import UserError, require
from unite_fast.sampling.distributed_sampler import Generation, sample_distributed
from unite_fast.sampling.pipeline import TrainedUNITE, weights_sha256
from unite_fast.sampling.sampler import check_classes
from unite_fast.utils.file_lock import LOCK, lock_folder
from unite_fast.utils.files import PARTIAL, atomic_write, flush, read_small, writing
from unite_fast.utils.images import image_file_name, save_png
from unite_fast.utils.parse_json import parse_json
from unite_fast.utils.progress import progress

MANIFEST = "generation.json"
MERGED = "merged"
"""Manifest key: the result is complete; only the rename or the deletion of the parts remains."""
FORMAT = "unite_fast generation 2"
"""Increase the number when the same settings produce other images (a solver's steps, the noise, the order of samples),
so that partial output of an older version is rejected instead of resumed."""
LONGEST_MANIFEST = 2**20
"""Bytes."""
ZIP_TIME = (1980, 1, 1, 0, 0, 0)
"""The earliest date a zip can hold. The real date would make files of equal samples differ."""


def write_samples(model: TrainedUNITE, generation: Generation, out: Path, ranks: Ranks = ALONE) -> Path:
    """Sample on all ranks into an .npz (arr_0 uint8 [num, S, S, 3], arr_1 labels) or a folder of PNGs. Resumes what an
    interrupted call with the same settings left.

    Returns:
        Path of the manifest: settings, weights, versions.

    Raises:
        UserError: `out` exists, its parts have other settings, or another process is writing them; label out of range;
            no space left.
    """
    total, size = len(generation.labels), model.config.model.image_size
    check_classes(generation.labels.unique().tolist(), model.config.model.num_classes)
    parts = make_parts(out, manifest(model, generation), generation.labels, generation.batch, size)
    with closing(parts):
        finished = ranks.run_on_first(parts.resume)
        done = min(len(finished) * generation.batch, total)
        bar = progress("generating", total, "images") if ranks.main else nullcontext(lambda done: None)
        with bar as show:
            show(done)
            for samples in sample_distributed(model.network, generation, ranks, finished):
                if len(samples.indices):
                    parts.write(int(samples.indices[0]) // generation.batch, samples.images)
                done = min(done + ranks.world * generation.batch, total)
                show(done)
        _wait_for_all(ranks)
        if ranks.main:
            parts.merge()
    return parts.manifest_path


def _wait_for_all(ranks: Ranks) -> None:
    try:
        ranks.gather(None)
    except RuntimeError as error:
        raise UserError("another process of this generation ended early; see its error message") from error


def manifest(model: TrainedUNITE, generation: Generation) -> dict:
    """Everything the images depend on, for JSON."""
    return {
        "format": FORMAT,
        "weights": weights_sha256(model),
        "images": len(generation.labels),
        "labels": hashlib.sha256(generation.labels.numpy().tobytes()).hexdigest(),
        "seed": generation.seed,
        "batch": generation.batch,
        "precision": generation.precision,
        "compile": generation.compile,
        # Rounding depends on the kind of device and on torch.
        "device": model.network.device.type,
        "torch": str(torch.__version__),
        **{f"sampling.{key}": value for key, value in asdict(generation.sampling).items()},
    }


class Parts:
    """The parts of one output while it is written; base of both kinds of output.

    Attributes:
        out: the final .npz or folder.
        folder: holds the parts until they are merged.
        manifest: the settings; parts of other settings are rejected.
        labels: int64 [num], the class of each sample.
        batch: samples per batch; batch b starts at sample b * batch.
        size: side of the images, pixels.
    """

    def __init__(self, out: Path, manifest: dict, labels: Tensor, batch: int, size: int):
        self.out, self.folder = out, out.with_name(out.name + ".parts")
        self.manifest = json.loads(json.dumps(manifest))
        self.labels, self.batch, self.size = labels, batch, size
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

    def write(self, number: int, images: Tensor) -> None:
        """Write a batch: uint8 [n, 3, S, S].

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


class NpzParts(Parts):
    """For one .npz in the usual form: arr_0 uint8 [num, S, S, 3], arr_1 int64 [num] (the classes).

    A part holds the raw bytes of its images. While merging, parts and .npz together take twice the space.
    """

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
        return self.folder / f"batch_{number:08d}.uint8"

    def finished(self) -> set[int]:
        if self.out.exists():
            return set(self.batches)
        image = self.size * self.size * 3
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder) if not entry.is_symlink()}
        # A power cut may leave a file whose bytes never reached the disk.
        return {b for b in self.batches if sizes.get(self.path(b).name) == len(self.samples(b)) * image}

    def write(self, number: int, images: Tensor) -> None:
        with atomic_write(self.path(number)) as partial:
            partial.write_bytes(images.permute(0, 2, 3, 1).contiguous().numpy().data)

    def merge(self) -> None:
        if not self.only_cleanup_left():
            self.check_free()
            with writing(self.out):
                self.merged.unlink(missing_ok=True)
                write_npz(
                    self.merged,
                    {
                        "arr_0": (
                            (len(self.labels), self.size, self.size, 3),
                            np.uint8,
                            (self.path(number).read_bytes() for number in self.batches),
                        ),
                        "arr_1": ((len(self.labels),), np.int64, [self.labels.numpy()]),
                    },
                )
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


class PngParts(Parts):
    """For a folder of PNGs: the parts are the final images, and merging renames the folder."""

    @property
    def manifest_path(self) -> Path:
        return self.out / MANIFEST

    def path(self, index: int) -> Path:
        return self.folder / image_file_name(index, int(self.labels[index]))

    def finished(self) -> set[int]:
        entries = (entry for entry in os.scandir(self.folder) if not entry.is_symlink())
        written = {entry.name for entry in entries if entry.stat().st_size}
        return {b for b in self.batches if all(self.path(i).name in written for i in self.samples(b))}

    def write(self, number: int, images: Tensor) -> None:
        for index, image in zip(self.samples(number), images.permute(0, 2, 3, 1).numpy(), strict=True):
            save_png(Image.fromarray(image), self.path(index), durable=False)

    def merge(self) -> None:
        with writing(self.out):
            for partial in self.folder.glob("*" + PARTIAL):
                partial.unlink()
            # Rename with the lock inside, so that no other process can start in the folder in between.
            os.replace(self.folder, self.out)
            self.close()
            (self.out / LOCK).unlink(missing_ok=True)


def make_parts(out: Path, manifest: dict, labels: Tensor, batch: int, size: int) -> Parts:
    """`NpzParts` if the name ends in .npz, `PngParts` if it has no suffix."""
    # The parts lie beside it, under its name.
    require(out.name not in ("", ".."), f"{out} has no name of its own; give a name to a new folder or .npz")
    require(out.suffix in (".npz", ""), f"{out} ends in {out.suffix}; write a .npz, or a folder (no suffix) of PNGs")
    return (NpzParts if out.suffix else PngParts)(out, manifest, labels, batch, size)


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


def write_npz(path: Path, arrays: dict[str, tuple[tuple[int, ...], type, Iterable]]) -> None:
    """`numpy.savez` for arrays that do not fit in memory: name -> shape, dtype and chunks of C-ordered bytes. The same
    arrays give the same file, byte for byte."""
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
        for name, (shape, dtype, chunks) in arrays.items():
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            with archive.open(zipfile.ZipInfo(f"{name}.npy", ZIP_TIME), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for chunk in chunks:
                    member.write(chunk)
