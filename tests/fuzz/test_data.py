"""Shard sets, pictures, IDX files, statistics, metrics, tar and Parquet files."""

import gzip
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from unite_fast.data_pipeline import UnreadableSample, open_source, read_image
from unite_fast.data_pipeline.idx import open_idx
from unite_fast.data_pipeline.shards.manifest import MANIFEST
from unite_fast.data_pipeline.shards.raw_images import find_raw_images
from unite_fast.data_pipeline.shards.source import ShardSource
from unite_fast.data_pipeline.shards.verify import verify_shards
from unite_fast.data_pipeline.shards.write import Settings, make_shards
from unite_fast.evaluation.fid import load_reference
from unite_fast.utils.rows import read_rows

pytestmark = pytest.mark.usefixtures("slow_inputs")

SIZE = 8


def _picture(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE + 3, SIZE + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        (folder / f"class{number % 3}").mkdir(exist_ok=True)
        _picture(number).save(folder / f"class{number % 3}" / f"{number}.jpg")
    return folder


@pytest.fixture(scope="session", params=["raw", "original"])
def shard_set(request, pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("set") / request.param
    make_shards(pictures, out, Settings(request.param, SIZE, per_shard=5), workers=1)
    return out


def _read_all(folder: Path) -> list[tuple[torch.Tensor, int] | None]:
    """Each sample; None for those that cannot be read."""
    source = ShardSource(folder, SIZE)
    samples = []
    for index in range(len(source)):
        image = np.empty((3, SIZE, SIZE), np.uint8)
        try:
            label = source.read_into(index, image)
            samples.append((torch.from_numpy(image), label))
        except UnreadableSample:
            samples.append(None)
    return samples


def _check_read(samples: list, whole: list) -> None:
    assert len(samples) == len(whole)
    for sample, expected in zip(samples, whole, strict=True):
        assert sample is None or (torch.equal(sample[0], expected[0]) and sample[1] == expected[1])


def test_damaged_shards(fuzz, shard_set):
    """`verify` finds each change; reading neither fails otherwise nor gives other labels or sizes."""
    whole = _read_all(shard_set)

    def one(draw, folder):
        copy = shutil.copytree(shard_set, folder / "set")
        path = draw(st.sampled_from(sorted(copy.glob("*.tar"))))
        original = path.read_bytes()
        path.write_bytes(draw(fuzz.damaged(original)))
        changed = path.read_bytes() != original
        assert bool(verify_shards(copy, 1)) == changed
        samples = _read_all(copy)
        if not changed:
            _check_read(samples, whole)
        assert all(sample is None or 0 <= sample[1] < 3 for sample in samples)

    fuzz("shards, damaged", one)


def test_damaged_manifests_and_indices(fuzz, shard_set):
    """The same samples, or an error at opening; and `verify` finds what changed."""
    whole = _read_all(shard_set)
    names = sorted(path.name for path in [*shard_set.glob("*.idx"), shard_set / MANIFEST])

    def one(draw, folder):
        copy = shutil.copytree(shard_set, folder / "set")
        path = copy / draw(st.sampled_from(names))
        path.write_bytes(draw(fuzz.damaged(path.read_bytes())))
        samples = _read_all(copy)
        _check_read(samples, whole)
        assert ShardSource(copy, SIZE).class_names == ["class0", "class1", "class2"]
        verify_shards(copy, 1)

    fuzz("manifests and indices", one)


def test_crafted_manifests(fuzz, shard_set):
    """As an earlier version wrote them, without hashes of their own."""
    tree = json.loads((shard_set / MANIFEST).read_text())
    old = {key: value for key, value in tree.items() if key in ("format", "image_size", "quality", "seed", "classes")}
    old |= {key: tree[key] for key in ("skipped", "samples", "crop")}
    old["shards"] = [{key: shard[key] for key in ("name", "samples", "bytes", "sha256")} for shard in tree["shards"]]

    def one(draw, folder):
        copy = shutil.copytree(shard_set, folder / "set")
        (copy / MANIFEST).write_text(json.dumps(draw(fuzz.changed_tree(old))))
        for sample in _read_all(copy):
            assert sample is None or sample[1] >= 0
        verify_shards(copy, 1)

    fuzz("manifests, crafted", one)


def test_pictures(fuzz):
    originals = []
    for kind, options in [
        *(("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("BMP", {}), ("GIF", {})),
        ("TIFF", {}),
    ]:
        file = io.BytesIO()
        _picture(3).save(file, kind, **options)
        originals.append(file.getvalue())

    def one(draw, folder):
        (folder / "a.png").write_bytes(draw(st.sampled_from(originals).flatmap(fuzz.damaged)))
        assert read_image(folder / "a.png", SIZE).shape == (SIZE, SIZE, 3)

    fuzz("pictures", one)


def test_idx_files(fuzz):
    images = bytes((0, 0, 8, 3)) + np.array([5, 8, 8], ">i4").tobytes() + bytes(range(256))[:64] * 5
    labels = bytes((0, 0, 8, 1)) + np.array([5], ">i4").tobytes() + bytes((0, 1, 2, 1, 0))
    files = {"train-images-idx3-ubyte": images, "train-labels-idx1-ubyte": labels}

    def one(draw, folder):
        changed = draw(st.sampled_from(sorted(files)))
        for name, content in files.items():
            content = draw(fuzz.damaged(content, 16)) if name == changed else content
            if draw(st.booleans()):
                name, content = f"{name}.gz", gzip.compress(content)
                content = draw(fuzz.damaged(content)) if draw(st.booleans()) else content
            (folder / name).write_bytes(content)
        source = open_idx(folder, SIZE, "train")
        assert source.images.shape == (len(source), SIZE, SIZE)
        assert int(source.labels.max()) < len(source.class_names)

    fuzz("IDX files", one)


def test_tar_files(fuzz, pictures):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.add(pictures, "train")
    content = file.getvalue()

    def one(draw, folder):
        (folder / "a.tar").write_bytes(draw(fuzz.damaged(content)))
        found = find_raw_images(folder / "a.tar", "train", None, folder / "staging")
        assert len(found) == len(found.labels) <= 13
        for number in range(len(found)):
            found.read(number)

    fuzz("tar files", one)


def test_parquet_files(fuzz, pictures):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = sorted(pictures.rglob("*.jpg"))
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    whole = io.BytesIO()
    parquet.write_table(pyarrow.table({"image": images, "label": [0, 1] * 6}), whole)

    def one(draw, folder):
        (folder / "data").mkdir()
        path = folder / "data" / "train-00000.parquet"
        labels = [0, 1] * 6
        if draw(st.booleans()):
            path.write_bytes(draw(fuzz.damaged(whole.getvalue())))
        else:
            labels[draw(st.integers(0, 11))] = draw(fuzz.value())
            if draw(st.booleans()):
                labels = [draw(fuzz.value())] * 12
            try:
                parquet.write_table(pyarrow.table({"image": images, "label": labels}), path)
            except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError, ValueError):
                return
        found = find_raw_images(folder / "data", "train", None, folder / "staging")
        assert len(found.labels) == 0 or 0 <= found.labels.min() <= found.labels.max() < len(found.class_names)

    fuzz("Parquet files", one)


def test_statistics(fuzz, tmp_path):
    generator = np.random.default_rng(0)
    meta = {"features": "pixels", "count": 100}
    np.savez(
        tmp_path / "ref.npz",
        mu=generator.normal(size=4),
        sigma=np.eye(4),
        samples=generator.normal(size=(9, 4)),
        meta_json=np.frombuffer(json.dumps(meta).encode(), np.uint8),
    )
    content = (tmp_path / "ref.npz").read_bytes()
    arrays = [
        *(np.array(["a"]), np.array([None], object), np.full(4, np.nan), np.ones((4, 4), complex), np.ones((4, 4))),
        *(np.ones(0), np.ones((2**8, 2**8), np.float16), np.array(3), np.ones(4, np.int64)),
    ]

    def one(draw, folder):
        path = folder / "ref.npz"
        if draw(st.booleans()):
            path.write_bytes(draw(fuzz.damaged(content, len(content))))
        else:
            with np.load(tmp_path / "ref.npz") as file:
                entries = {name: file[name] for name in file.files}
            entries[draw(st.sampled_from(sorted(entries)))] = draw(st.sampled_from(arrays))
            if draw(st.booleans()):
                text = json.dumps(draw(fuzz.changed_tree(meta))).encode(errors="replace")
                entries["meta_json"] = np.frombuffer(text, np.uint8)
            np.savez(path, **entries)
        reference = load_reference(path)
        assert reference.statistics.covariance.shape == (len(reference.statistics.mean),) * 2
        assert reference.statistics.mean.isfinite().all()

    fuzz("statistics", one)


def test_rows_of_metrics(fuzz):
    row = {"step": 50, "total": 1.5, "l1": 0.5, "lr": 1e-3, "skipped_steps": 0}
    text = "".join(json.dumps(row | {"step": step}) + "\n" for step in range(50, 500, 50)).encode()

    def one(draw, folder):
        content = draw(fuzz.damaged(text, len(text)))
        if draw(st.booleans()):
            content += json.dumps(draw(fuzz.changed_tree(row))).encode(errors="replace") + b"\n"
        (folder / "metrics.jsonl").write_bytes(content)
        for read in read_rows(folder / "metrics.jsonl"):
            assert type(read["step"]) is int

    fuzz("rows of metrics", one)


def test_folders(fuzz):
    """Names of folders and files that no one expects: opened with one class per folder, or refused."""
    content = io.BytesIO()
    _picture(1).save(content, "PNG")
    name = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=12)

    def one(draw, folder):
        data = folder / "data"
        for _ in range(draw(st.integers(1, 4))):
            place = data.joinpath(*draw(st.lists(st.one_of(name, st.sampled_from(["train", "val", "a"])), max_size=3)))
            if place.name in (".", "..") or not place.resolve().is_relative_to(data.resolve()):
                continue
            try:
                place.mkdir(parents=True, exist_ok=True)
                (place / draw(st.sampled_from(["a.png", "b.PNG", ".a.png", "c.txt", "d.jpg"]))).write_bytes(
                    content.getvalue()
                )
            except OSError:
                continue
        source = open_source("folder", str(data), SIZE, "train")
        images, labels = source.read(range(len(source)))
        assert images.shape == (len(source), 3, SIZE, SIZE)
        assert sum(source.class_counts()) == len(source)
        assert labels.max() < len(source.class_names)
        assert all(source.name(index).isprintable() for index in range(len(source)))

    fuzz("folders", one)
