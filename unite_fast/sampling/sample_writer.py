"""Write many samples to files: parts while sampling runs, then one file or a folder of PNGs. Resumable.

While sampling runs, the folder OUT.parts holds the manifest `generation.json` (all settings) and the finished batches.
Files are written to a temporary name and renamed, so a file with its final name is complete, and a killed run resumes
with the missing batches. At the end the manifest is in the folder of PNGs, or next to the .npz under its name:
samples.json for samples.npz.
"""

import hashlib
import os
import zipfile
from collections.abc import Iterable
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unite_fast.config import MOLECULES, ModelConfig
from unite_fast.data_pipeline.molecules.write import MOLECULE_FILES, BondsOf, write_molecules
from unite_fast.distributed.process_group import ALONE, Ranks
from unite_fast.errors import require
from unite_fast.sampling.distributed_sampler import Generation, sample_distributed
from unite_fast.sampling.molecules import unpack
from unite_fast.sampling.pipeline import TrainedModel, weights_sha256
from unite_fast.sampling.sample_parts import FORMAT, MANIFEST, FileParts, Parts
from unite_fast.sampling.sampler import check_classes
from unite_fast.utils.file_lock import LOCK
from unite_fast.utils.files import PARTIAL, writing
from unite_fast.utils.images import image_file_name, save_png
from unite_fast.utils.progress import progress

ZIP_TIME = (1980, 1, 1, 0, 0, 0)
"""The earliest date a zip can hold. The real date would make files of equal samples differ."""


def write_samples(
    model: TrainedModel, generation: Generation, out: Path, ranks: Ranks = ALONE, bonds: BondsOf | None = None
) -> Path:
    """Sample on all ranks. Resumes what an interrupted call with the same settings left.

    Args:
        out: of images an .npz (arr_0 uint8 [num, S, S, 3], arr_1 labels) or a folder of PNGs; of molecules an .xyz,
            .sdf or .npz.
        bonds: of the molecules in an .sdf; None: it has none.

    Returns:
        Path of the manifest: settings, weights, versions.

    Raises:
        UserError: `out` exists, its parts have other settings, or another process is writing them; label out of range;
            no space left.
    """
    total = len(generation.labels)
    check_classes(generation.labels.unique().tolist(), model.config.model.num_classes)
    parts = make_parts(out, manifest(model, generation), generation.labels, generation.batch, model.config.model, bonds)
    with closing(parts):
        finished = ranks.run_on_first(parts.resume)
        done = min(len(finished) * generation.batch, total)
        bar = (
            progress("generating", total, model.config.model.modality) if ranks.main else nullcontext(lambda done: None)
        )
        with bar as show:
            show(done)
            for samples in sample_distributed(model.network, generation, ranks, finished):
                if len(samples.indices):
                    parts.write(int(samples.indices[0]) // generation.batch, samples.images)
                done = min(done + ranks.world * generation.batch, total)
                show(done)
        ranks.wait()
        if ranks.main:
            parts.merge()
    return parts.manifest_path


def manifest(model: TrainedModel, generation: Generation) -> dict:
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


class NpzParts(FileParts):
    """For one .npz in the usual form: arr_0 uint8 [num, S, S, 3], arr_1 int64 [num] (the classes)."""

    part_suffix = "uint8"

    def __init__(self, out: Path, manifest: dict, labels: Tensor, batch: int, size: int):
        """`size`: side of the images, pixels."""
        super().__init__(out, manifest, labels, batch)
        self.size, self.sample_bytes = size, size * size * 3

    def bytes_of(self, samples: Tensor) -> memoryview:
        return samples.permute(0, 2, 3, 1).contiguous().numpy().data

    def write_result(self, path: Path) -> None:
        images = (len(self.labels), self.size, self.size, 3), np.uint8, self.contents()
        write_npz(path, {"arr_0": images, "arr_1": ((len(self.labels),), np.int64, [self.labels.numpy()])})


class MoleculeParts(FileParts):
    """For one .xyz, .sdf or .npz of molecules."""

    part_suffix = "float32"

    def __init__(
        self, out: Path, manifest: dict, labels: Tensor, batch: int, model: ModelConfig, bonds: BondsOf | None
    ):
        super().__init__(out, manifest, labels, batch)
        self.model, self.bonds, self.sample_bytes = model, bonds, model.latent_tokens * 4 * 4

    def bytes_of(self, samples: Tensor) -> memoryview:
        return samples.contiguous().numpy().data

    def write_result(self, path: Path) -> None:
        atoms = np.frombuffer(bytearray().join(self.contents()), np.float32)
        atoms = torch.from_numpy(atoms.reshape(len(self.labels), self.model.latent_tokens, 4))
        write_molecules(path, unpack(atoms, self.labels, self.model.symbols), self.out.suffix, self.bonds)


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

    def write(self, number: int, samples: Tensor) -> None:
        for index, image in zip(self.samples(number), samples.permute(0, 2, 3, 1).numpy(), strict=True):
            save_png(Image.fromarray(image), self.path(index), durable=False)

    def merge(self) -> None:
        with writing(self.out):
            for partial in self.folder.glob("*" + PARTIAL):
                partial.unlink()
            # Rename with the lock inside, so that no other process can start in the folder in between.
            os.replace(self.folder, self.out)
            self.close()
            (self.out / LOCK).unlink(missing_ok=True)


def make_parts(
    out: Path, manifest: dict, labels: Tensor, batch: int, model: ModelConfig, bonds: BondsOf | None = None
) -> Parts:
    """The parts of an output by the suffix of its name; `bonds` is for an .sdf."""
    # The parts lie beside it, under its name.
    require(out.name not in ("", ".."), f"{out} has no name of its own; give a name to a new folder or .npz")
    if model.modality == MOLECULES:
        kinds = f"{', '.join(MOLECULE_FILES[:-1])} or {MOLECULE_FILES[-1]}"
        require(out.suffix in MOLECULE_FILES, f"{out} is a name for no file of molecules; it must end in {kinds}")
        return MoleculeParts(out, manifest, labels, batch, model, bonds)
    require(out.suffix in (".npz", ""), f"{out} ends in {out.suffix}; write a .npz, or a folder (no suffix) of PNGs")
    if out.suffix:
        return NpzParts(out, manifest, labels, batch, model.image_size)
    return PngParts(out, manifest, labels, batch)


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
