"""The files of a large generation: parts while it runs, one .npz or a folder of PNGs when it is done.

While it runs, everything is in the folder OUT.parts: `generation.json`, which says what is generated, and the finished
batches. A file is written aside and renamed, so whatever has its name is whole, and a generation that was killed goes
on with the batches that are missing. In the end `generation.json` is in the folder of PNGs, or beside the .npz by its
name: samples.json for samples.npz.
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
from unite_fast.sampling.distributed_sampler import Generation, generate_batches
from unite_fast.sampling.pipeline import TrainedUNITE, weights_sha256
from unite_fast.sampling.sampler import check_classes
from unite_fast.utils.file_lock import LOCK, hold
from unite_fast.utils.files import writing, writing_aside
from unite_fast.utils.images import picture_name
from unite_fast.utils.progress import progress

MANIFEST = "generation.json"
MERGED = "merged"
"""Key of the manifest: the result is written, and has only to be renamed or its parts deleted."""
FORMAT = "unite_fast generation 2"
"""Raise the number whenever a version of this code draws other images from the same settings (a solver's steps, the
noise, the order of the samples): parts of an earlier version are then refused, where they would be gone on with."""
PARTIAL = ".partial"
ZIP_TIME = (1980, 1, 1, 0, 0, 0)
"""The earliest that a zip can say. The real time would make the bytes of equal samples differ."""


def generate_files(model: TrainedUNITE, generation: Generation, out: Path, ranks: Ranks = ALONE) -> Path:
    """Generate into an .npz (arr_0 uint8 [num, S, S, 3], arr_1 labels) or a folder of PNGs, all processes together.
    What an earlier call with the same settings had finished when it was killed is kept.

    Returns:
        The file that says what was generated: settings, weights, versions.

    Raises:
        UserError: `out` is there already, or parts of it with other settings, or another process writes them; a label
            that is no class; no space left.
    """
    total, size = len(generation.labels), model.config.model.image_size
    check_classes(generation.labels.unique().tolist(), model.config.model.num_classes)
    parts = make_parts(out, manifest(model, generation), generation.labels, generation.batch, size)
    with closing(parts):
        finished = ranks.run_on_first(parts.resume)
        shown = min(len(finished) * generation.batch, total)
        bar = progress("generating", total, "images") if ranks.main else nullcontext(lambda done: None)
        with bar as show:
            show(shown)
            for drawn in generate_batches(model.network, generation, ranks, finished):
                if len(drawn.indices):
                    parts.write(int(drawn.indices[0]) // generation.batch, drawn.images)
                shown = min(shown + ranks.world * generation.batch, total)
                show(shown)
        _wait_for_all(ranks)
        if ranks.main:
            parts.merge()
    return parts.about


def _wait_for_all(ranks: Ranks) -> None:
    try:
        ranks.gather(None)
    except RuntimeError as error:
        raise UserError("another process of this generation ended early; its own message says why") from error


def manifest(model: TrainedUNITE, generation: Generation) -> dict:
    """All that the images depend on, as JSON has it."""
    return {
        "format": FORMAT,
        "weights": weights_sha256(model),
        "images": len(generation.labels),
        "labels": hashlib.sha256(generation.labels.numpy().tobytes()).hexdigest(),
        "seed": generation.seed,
        "batch": generation.batch,
        "precision": generation.precision,
        "compile": generation.compile,
        # Another kind of device or another torch rounds otherwise.
        "device": model.network.device.type,
        "torch": str(torch.__version__),
        **{f"sampling.{key}": value for key, value in asdict(generation.sampling).items()},
    }


class Parts:
    """Shared by both kinds of output.

    Attributes:
        out: what is there in the end.
        about: the manifest that is there in the end.
        folder: what is there meanwhile.
        manifest: the settings, as JSON has them; parts of other settings are refused.
        labels: int64 [num], sample i's class.
        batch: images a batch; batch b has the samples from b * batch on.
        size: side of the images, pixels.
    """

    about: Path

    def __init__(self, out: Path, manifest: dict, labels: Tensor, batch: int, size: int):
        self.out, self.folder = out, out.with_name(out.name + ".parts")
        self.manifest = json.loads(json.dumps(manifest))
        self.labels, self.batch, self.size = labels, batch, size
        self.lock: TextIO | None = None

    def open(self) -> None:
        """Make the folder, or see that the one that is there belongs to this generation; hold it until `close`.

        Raises:
            UserError: `out` is there already, parts of other settings, another process writes them, no permission.
        """
        self.check_free()
        self.lock = hold(self.folder, "being written", "choose another --out")
        self.check_free()  # the process that held it may just have finished
        path = self.folder / MANIFEST
        if path.exists():
            self.check(path)
        else:
            write_manifest(path, self.manifest)

    def resume(self) -> set[int]:
        """Open, and give the numbers of the batches that an earlier call finished. Raises what `open` raises."""
        self.open()
        return self.finished()

    def close(self) -> None:
        if self.lock:
            self.lock.close()

    def check_free(self) -> None:
        """
        Raises:
            UserError: something that is not this generation's has a name that it needs.
        """
        empty = not self.out.suffix and self.out.is_dir() and not os.listdir(self.out)
        require(not self.out.exists() or empty or self.killed_at_the_end(), self.in_the_way())
        with writing(self.folder):
            names = os.listdir(self.folder) if self.folder.is_dir() else []
        require(
            MANIFEST in names or all(name == LOCK or name.endswith(PARTIAL) for name in names),
            f"{self.folder} is in the way: it has no {MANIFEST}; move it or choose another --out",
        )

    def in_the_way(self) -> str:
        return f"{self.out} is there already; choose another --out or delete it"

    def killed_at_the_end(self) -> bool:
        """Whether `out` is this generation's own, complete, and only its parts are left to delete."""
        return False

    def read(self, path: Path) -> dict:
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}; delete {self.folder} to begin anew") from error
        require(isinstance(before, dict), f"{path} is none of ours; delete {self.folder} to begin anew")
        return before

    def check(self, path: Path) -> None:
        before = self.read(path)
        before.pop(MERGED, None)
        require(
            before.get("format") == FORMAT,
            f"{self.folder} was begun by a version of unite_fast that draws other images (its format is "
            f"{before.get('format')}, not {FORMAT}); choose another --out, or delete it",
        )
        for key in self.manifest | before:
            require(
                before.get(key) == self.manifest.get(key),
                f"{self.folder} holds a part of other samples: {key} was {before.get(key)} and is "
                f"{self.manifest.get(key)} now; give the same settings as then, choose another --out, or delete it",
            )

    def samples(self, number: int) -> range:
        return range(number * self.batch, min((number + 1) * self.batch, len(self.labels)))

    def finished(self) -> set[int]:
        """Numbers of the batches that are there, whole."""
        raise NotImplementedError

    def write(self, number: int, images: Tensor) -> None:
        """Keep a batch: uint8 [n, 3, S, S].

        Raises:
            UserError: no space left, no permission.
        """
        raise NotImplementedError

    def merge(self) -> None:
        """Make `out` of the parts, all of which must be there, and leave nothing else behind.

        Raises:
            UserError: no space left, no permission; the parts stay.
        """
        raise NotImplementedError


class NpzParts(Parts):
    """For one .npz in the field's form: arr_0 uint8 [num, S, S, 3], arr_1 int64 [num], the classes.

    A part is the bytes of its images. Parts and the .npz are there together for a while: it takes twice the space.
    """

    @property
    def about(self) -> Path:
        return self.out.with_suffix(".json")

    @property
    def whole(self) -> Path:
        """The result before it is renamed."""
        return self.folder / (self.out.name + PARTIAL)

    def killed_at_the_end(self) -> bool:
        manifest = self.folder / MANIFEST
        if not (self.out.is_file() and manifest.is_file()):
            return False
        # As long as the result has its other name, `out` is another file.
        return self.read(manifest).get(MERGED) is True and not self.whole.exists()

    def check_free(self) -> None:
        super().check_free()
        # An earlier generation's is written over: the .npz that it belonged to is gone.
        require(
            self.out.exists() or not self.about.exists() or is_manifest(self.about),
            f"{self.about} is in the way: what is known of {self.out.name} is to be kept there; move it or choose "
            "another --out",
        )

    def path(self, number: int) -> Path:
        return self.folder / f"batch_{number:08d}.uint8"

    def finished(self) -> set[int]:
        batches = range(-(-len(self.labels) // self.batch))
        if self.out.exists():
            return set(batches)
        image = self.size * self.size * 3
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder)}
        # A power cut may leave a file whose bytes never reached the disk.
        return {b for b in batches if sizes.get(self.path(b).name) == len(self.samples(b)) * image}

    def write(self, number: int, images: Tensor) -> None:
        with writing_aside(self.path(number)) as partial:
            partial.write_bytes(images.permute(0, 2, 3, 1).contiguous().numpy())

    def merge(self) -> None:
        numbers = range(-(-len(self.labels) // self.batch))
        if not self.killed_at_the_end():
            self.check_free()
            with writing(self.out):
                write_npz(
                    self.whole,
                    {
                        "arr_0": (
                            (len(self.labels), self.size, self.size, 3),
                            np.uint8,
                            (self.path(number).read_bytes() for number in numbers),
                        ),
                        "arr_1": ((len(self.labels),), np.int64, [self.labels.numpy()]),
                    },
                )
            # Before the renaming, so that `out` is never there without a word of whose it is.
            write_manifest(self.folder / MANIFEST, self.manifest | {MERGED: True})
            write_manifest(self.about, self.manifest)
            with writing(self.out):
                os.replace(self.whole, self.out)
        with writing(self.folder):
            # The manifest goes after them: as long as it is there, a rerun knows whose `out` is.
            for path in self.folder.iterdir():
                if path.name not in (MANIFEST, LOCK):
                    path.unlink()
            (self.folder / MANIFEST).unlink()
            self.close()  # NFS keeps the name of a file that is open
            (self.folder / LOCK).unlink(missing_ok=True)
            self.folder.rmdir()


class PngParts(Parts):
    """For a folder of PNGs: the parts are the pictures themselves, and in the end the folder is renamed."""

    @property
    def about(self) -> Path:
        return self.out / MANIFEST

    def path(self, index: int) -> Path:
        return self.folder / picture_name(index, int(self.labels[index]))

    def finished(self) -> set[int]:
        there = {entry.name for entry in os.scandir(self.folder) if entry.stat().st_size}
        batches = range(-(-len(self.labels) // self.batch))
        return {b for b in batches if all(self.path(i).name in there for i in self.samples(b))}

    def write(self, number: int, images: Tensor) -> None:
        for index, image in zip(self.samples(number), images.permute(0, 2, 3, 1).numpy(), strict=True):
            with writing_aside(self.path(index)) as partial:
                Image.fromarray(image).save(partial, format="PNG")

    def merge(self) -> None:
        with writing(self.out):
            for left in self.folder.glob("*" + PARTIAL):
                left.unlink()
            # With its lock, so that at no moment another process could begin in it.
            os.replace(self.folder, self.out)
            self.close()
            (self.out / LOCK).unlink(missing_ok=True)


def make_parts(out: Path, manifest: dict, labels: Tensor, batch: int, size: int) -> Parts:
    """For a name that ends in .npz, or in nothing, which is a folder of PNGs."""
    require(out.suffix in (".npz", ""), f"{out} ends in {out.suffix}; write a .npz, or a folder (no ending) of PNGs")
    return (NpzParts if out.suffix else PngParts)(out, manifest, labels, batch, size)


def write_manifest(path: Path, manifest: dict) -> None:
    with writing_aside(path) as partial:
        partial.write_text(json.dumps(manifest, indent=1))


def is_manifest(path: Path) -> bool:
    """Whether a file is the manifest of a generation, of any version."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and str(found.get("format")).startswith(FORMAT.rstrip("0123456789"))


def write_npz(path: Path, arrays: dict[str, tuple[tuple[int, ...], type, Iterable]]) -> None:
    """What `numpy.savez` writes, for arrays that do not fit in memory: name -> shape, dtype and the C-ordered bytes, in
    pieces. The same arrays give the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, (shape, dtype, pieces) in arrays.items():
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            with archive.open(zipfile.ZipInfo(f"{name}.npy", ZIP_TIME), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for piece in pieces:
                    member.write(piece)
