"""Make a shard set: `unite-fast shards make`."""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from unite_fast.data_pipeline.image_folder import open_image
from unite_fast.data_pipeline.images import adm_center_crop, to_rgb
from unite_fast.data_pipeline.molecules.set_file import check_no_molecules
from unite_fast.data_pipeline.shards.listed import RawImages
from unite_fast.data_pipeline.shards.manifest import (
    FORMATS,
    MANIFEST,
    Index,
    Manifest,
    Shard,
    index_path,
    read_manifest,
    write_manifest,
)
from unite_fast.data_pipeline.shards.parquet_files import Columns
from unite_fast.data_pipeline.shards.raw_images import find_raw_images
from unite_fast.data_pipeline.shards.source import splits_in
from unite_fast.data_pipeline.source import UnreadableSample
from unite_fast.data_pipeline.splits import TRAIN, is_held_out, split_of_name, training_split
from unite_fast.errors import UserError, printable, require
from unite_fast.randomness import permutation
from unite_fast.utils.file_lock import lock_output
from unite_fast.utils.files import atomic_write, check_not_read, clear_partial, read_small, save_text, writing
from unite_fast.utils.parse_json import check_kind, parse_json
from unite_fast.utils.pretrained import file_sha256
from unite_fast.utils.progress import progress

SKIPPED_LOG = "skipped.log"
_PLAN = "plan.json"
_STAGING = "staging"
_BLOCK = 512
_MOST_RECORD_BYTES = 2**28
_LARGEST_SIDE = 16384
_NAMED_CLASSES = 5
_NO_EPOCH = 2**32 - 1
"""The shuffle uses the order of an epoch that no run reaches: no run then reads the shards sequentially by chance."""


@dataclass(frozen=True)
class Settings:
    """The settings that a shard set's contents depend on.

    Attributes:
        format: original, cropped-jpeg or raw.
        image_size: side of the cropped images, pixels; 0 for original.
        quality: JPEG quality of cropped-jpeg, 95 to 100, None for 95; for the other formats None, which becomes 0.
        seed: seed of the shuffle.
        per_shard: samples per shard.
    """

    format: str
    image_size: int = 256
    quality: int | None = None
    seed: int = 0
    per_shard: int = 5000

    def __post_init__(self):
        if self.format not in FORMATS:
            raise UserError(f"--format is {self.format!r}: choose one of {', '.join(FORMATS)}")
        if self.format == "original":
            object.__setattr__(self, "image_size", 0)
        elif not 1 <= self.image_size <= _LARGEST_SIDE:
            raise UserError(f"--image-size is {self.image_size}: it must be in 1..{_LARGEST_SIDE}")
        if self.format != "cropped-jpeg":
            if self.quality:
                raise UserError(f"--quality is {self.quality}, but --format {self.format} has none: leave it out")
            object.__setattr__(self, "quality", 0)
        elif self.quality is None:
            object.__setattr__(self, "quality", 95)
        elif not 95 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}: it must be in 95..100; below, the loss is visible")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"--seed is {self.seed}: it must be in [0, 2**64)")
        if self.per_shard < 1:
            raise UserError(f"--per-shard is {self.per_shard}: it must be positive")


def make_shards(
    source: Path,
    out: Path,
    settings: Settings,
    workers: int,
    split: str = "train",
    labels: Path | None = None,
    columns: Columns | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Manifest:
    """Make a shard set, or finish one that was interrupted; complete shards are not made again.

    The shards do not depend on the number of workers. Broken images are skipped, counted in the manifest and named in
    skipped.log.

    Args:
        source, split, labels, columns: see `find_raw_images`.
        out: folder of the shard set. A held-out set beside a training set gets the labels of that.
        workers: number of processes.
        say: called with a line for what is read, for what a user should know about it, and for each kind of file that
            is left out.

    Raises:
        UserError: no readable images, no space, `out` holds another set, or a worker was killed.
    """
    check_no_molecules(source)
    check_not_read(out, source, *([labels] if labels else []))
    check_not_read(source, out / _STAGING)  # deleted at the end
    require(os.path.isdir(out) or not os.path.lexists(out), f"{out} is a file: give a folder for the shards")
    with lock_output(out):
        clear_partial(out)
        for leftover in out.glob("shard-?????.tar.partial"):  # as earlier versions called them
            leftover.unlink()
        images = find_raw_images(source, split, labels, out / _STAGING, columns)
        _check_split_of(out, images, source)
        _conform_to_training_set(images, source, out)
        of_split = f" of split {printable(images.split)}" if images.split else ""
        names = ", ".join(map(printable, images.class_names[:_NAMED_CLASSES]))
        more = ", ..." if len(images.class_names) > _NAMED_CLASSES else ""
        say(f"{source}: {len(images)} images{of_split} in {len(images.class_names)} classes: {names}{more}")
        for line in images.notes:
            say(printable(line))
        for line in images.left_out.lines():
            say(f"left out: {line}")
        return _make_shards(images, out, settings, workers)


def _make_shards(images: RawImages, out: Path, settings: Settings, workers: int) -> Manifest:
    plan = asdict(settings) | {"images": len(images), "listing": images.fingerprint()}
    if _begin(out, plan):
        _tidy(out)
        return read_manifest(out / MANIFEST)
    order = permutation(settings.seed, _NO_EPOCH, len(images)).numpy()
    shards = [order[first : first + settings.per_shard] for first in range(0, len(order), settings.per_shard)]
    missing = [number for number in range(len(shards)) if _read_record(out, number) is None]
    done_before = sum(len(shard) for number, shard in enumerate(shards) if number not in set(missing))
    _run(workers, len(images), done_before, (out, settings, images, shards), missing)
    return _finish(out, settings, images, len(shards))


def _check_split_of(out: Path, images: RawImages, source: Path) -> None:
    """
    Raises:
        UserError: training images would become a held-out set, by the name of `out`.
    """
    word, name = split_of_name(images.split or source.stem), out.absolute().name.lower()
    if word in TRAIN and is_held_out(name):
        raise UserError(
            f"{out} would be called {name}, but hold the training images of {source}: choose --split {name}, or "
            "another folder"
        )


def _conform_to_training_set(images: RawImages, source: Path, out: Path) -> None:
    """Give held-out images the labels of the training set beside `out`: those of shards/train to shards/val.

    Raises:
        ClassesDiffer: they have a class that the training set lacks.
    """
    out = out.absolute()
    training = training_split(splits_in(out.parent)) if is_held_out(out.name) else None
    if training is not None:
        folder = out.with_name(training)
        images.conform(list(read_manifest(folder / MANIFEST).classes), source, folder)


def _begin(out: Path, plan: dict) -> bool:
    """Record the plan in `out`; returns whether the set is complete already."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plan, indent=1) + "\n"
    path = out / _PLAN
    before = read_small(path, _MOST_RECORD_BYTES).decode(errors="replace") if path.exists() else None
    if before is None and any(out.glob("shard-*")):
        raise UserError(f"{out} holds shards of unknown origin: choose another folder")
    if before not in (None, text):
        raise UserError(f"{out} holds shards of other images or settings: use the same ones again, or another folder")
    save_text(text, path)
    return (out / MANIFEST).exists()


def _run(workers: int, total: int, done: int, job: tuple, missing: list[int]) -> None:
    """Make the missing shards in worker processes, with a progress bar."""
    fork = multiprocessing.get_context("fork")
    counter = fork.Value("q", done)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(max(1, min(workers, len(missing))), fork, _start_worker, (*job, counter))
    try:
        with progress("shards", total, "images") as show:
            pending = {pool.submit(_write_shard, number) for number in missing}
            while pending:
                show(counter.value)
                finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
            show(counter.value)
        pool.shutdown()
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a worker process was killed, perhaps out of memory: use fewer --workers; "
                "the same command again continues from the shards that are complete"
            ) from None
        raise


def _start_worker(*job) -> None:
    global _job
    _job = job
    # Only the parent handles Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit with the parent: an orphaned worker would write to the files of the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker"
    parent.join()
    os._exit(1)


def _write_shard(number: int) -> None:
    """Write one shard and its index, then the record that marks it complete."""
    out, settings, images, shards, counter = _job
    path = out / f"shard-{number:05d}.tar"
    skipped: list[tuple[str, str]] = []
    counts: Counter[int] = Counter()
    keys, places, extensions = [], [], []
    with atomic_write(path) as partial:
        with open(partial, "wb") as file:
            tar = _Tar(file)
            for key in shards[number].tolist():
                counter.value += 1  # not atomic, but only the progress bar reads it
                try:
                    extension, data = _encode(images.read(key), images.name(key), settings)
                except UnreadableSample as error:
                    skipped.append((error.name, error.reason))
                    continue
                label = int(images.labels[key])
                places.append((tar.add(f"{key:012d}.cls", b"%d" % label), tar.add(f"{key:012d}.{extension}", data)))
                keys.append(key)
                extensions.append(extension)
                counts[label] += 1
            tar.close()
        offsets = np.array(places, dtype=np.int64).reshape(-1, 2, 2)
        index = Index(np.array(keys), offsets[:, 0], offsets[:, 1], extensions).text()
        save_text(index, index_path(path))
    index_sha256 = hashlib.sha256(index.encode()).hexdigest()
    shard = Shard(path.name, len(keys), tar.size, tar.digest.hexdigest(), index_sha256)
    record = {"shard": asdict(shard), "counts": sorted(counts.items()), "skipped": skipped}
    save_text(json.dumps(record), _record_path(out, number))


@dataclass
class _Record:
    """What a worker says of a complete shard."""

    shard: Shard
    counts: list[tuple[int, int]]
    """Label and number of images."""
    skipped: list[tuple[str, str]]
    """Name and reason."""


def _read_record(out: Path, number: int) -> _Record | None:
    """The record of a shard; None if there is none, or not of this shard as it is on disk: it is then made again."""
    path = out / f"shard-{number:05d}.tar"
    try:
        tree = parse_json(read_small(_record_path(out, number), _MOST_RECORD_BYTES))
        record = check_kind(_Record, tree)
        if record.shard.name != path.name or path.stat().st_size != record.shard.bytes:
            return None
        digest = file_sha256(index_path(path))
    except (OSError, ValueError):
        return None
    if record.shard.index_sha256 not in ("", digest):
        return None
    return replace(record, shard=replace(record.shard, index_sha256=digest), skipped=tree["skipped"])


def _record_path(out: Path, number: int) -> Path:
    return out / f"shard-{number:05d}.done"


class _Tar:
    """Writes a tar file and hashes it. The same files give the same bytes."""

    def __init__(self, file):
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def add(self, name: str, data: bytes) -> tuple[int, int]:
        """Returns offset and size of the data."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.size
        self._write(data)
        self._write(bytes(-len(data) % _BLOCK))
        return offset, len(data)

    def close(self) -> None:
        self._write(bytes(2 * _BLOCK))

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)


def _encode(data: bytes, name: str, settings: Settings) -> tuple[str, bytes]:
    """Extension and contents of an image in the format of the shards.

    Raises:
        UnreadableSample: the image is broken.
    """
    with open_image(io.BytesIO(data), name) as image:
        if settings.format != "original":
            pixels = adm_center_crop(image, settings.image_size)
            if settings.format == "raw":
                return "raw", pixels.transpose(2, 0, 1).tobytes()
            # 4:4:4: chroma at half size would blur the crop.
            return "jpg", _saved(Image.fromarray(pixels), "JPEG", quality=settings.quality, subsampling=0)
        image.load()  # decode it fully, so that a broken image is found now and not during training
        if data[:2] == b"\xff\xd8" and image.mode in ("RGB", "L"):
            return "jpg", data
        # CMYK, 16 bits, palettes, transparency: stored as RGB PNG, which every decoder reads alike, without loss.
        return "png", _saved(to_rgb(image), "PNG")


def _saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _finish(out: Path, settings: Settings, images: RawImages, shards: int) -> Manifest:
    """Write the manifest from the records of all shards."""
    records = [record for number in range(shards) if (record := _read_record(out, number))]
    if len(records) < shards:
        raise UserError(f"files in {out} were changed meanwhile: the same command again makes them anew")
    counts: Counter[int] = Counter()
    for record in records:
        counts.update(dict(record.counts))
    skipped = [f"{name}: {reason}" for record in records for name, reason in record.skipped]
    save_text("".join(line + "\n" for line in sorted(skipped)), out / SKIPPED_LOG)
    if len(skipped) == len(images):
        raise UserError(f"none of the {len(images)} images can be read, e.g. {skipped[0]}")
    manifest = Manifest(
        format=settings.format,
        image_size=settings.image_size,
        quality=settings.quality or 0,
        seed=settings.seed,
        classes={name: counts[label] for label, name in enumerate(images.class_names)},
        shards=[record.shard for record in records],
        skipped=len(skipped),
    )
    write_manifest(out, manifest)
    _tidy(out)
    return manifest


def _tidy(out: Path) -> None:
    """Delete what a complete set does not need; a kill before or meanwhile may leave it."""
    for record in out.glob("shard-*.done"):
        record.unlink(missing_ok=True)
    shutil.rmtree(out / _STAGING, ignore_errors=True)
