"""Make shards: their contents, what the contents depend on, and resume after an interruption."""

import io
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from unite_fast.data_pipeline import open_source
from unite_fast.data_pipeline.shards.manifest import read_manifest
from unite_fast.data_pipeline.shards.source import ShardSource
from unite_fast.data_pipeline.shards.write import Settings
from unite_fast.errors import UserError

SIZE = 32


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_the_manifest_counts(shards):
    for format, size in (("raw", SIZE), ("cropped-jpeg", SIZE), ("original", 0)):
        manifest = read_manifest(shards(format) / "dataset.json")
        assert (manifest.format, manifest.image_size, manifest.seed, manifest.skipped) == (format, size, 0, 0)
        assert manifest.classes == {"class0": 14, "class1": 14, "class2": 13}
        assert [shard.samples for shard in manifest.shards] == [9, 9, 9, 9, 5]
        for shard in manifest.shards:
            assert (shards(format) / shard.name).stat().st_size == shard.bytes
    tree = json.loads((shards("raw") / "dataset.json").read_text())
    assert (tree["samples"], tree["crop"]) == (41, "ADM centre crop")


def test_no_temporary_files_are_left(shards):
    names = {f"shard-{number:05d}.{kind}" for number in range(5) for kind in ("tar", "idx")}
    assert set(contents(shards("raw"))) == names | {"dataset.json", "plan.json", "skipped.log"}


def test_raw_is_the_folder_bit_for_bit(shards, image_folder):
    folder = open_source("folder", str(image_folder), SIZE, "train")
    images, labels = folder.read(range(41))
    for format in ("raw", "original"):
        actual, labels_read = open_source("shards", str(shards(format)), SIZE, "train").read(range(41))
        assert torch.equal(actual, images) and torch.equal(labels_read, labels)


def test_cropped_jpegs_are_close_to_the_images(shards, image_folder):
    images = open_source("folder", str(image_folder), SIZE, "train").read(range(41))[0].float()
    actual = open_source("shards", str(shards("cropped-jpeg")), SIZE, "train").read(range(41))[0].float()
    # Quality 95 without subsampling; measured 1.3 on these noisy images.
    assert (actual - images).abs().mean() < 2


def test_shards_depend_on_the_seed_and_not_on_workers(image_folder, make, tmp_path):
    one, _ = make(image_folder, workers=1, out=tmp_path / "1")
    three, _ = make(image_folder, workers=3, out=tmp_path / "3")
    other, _ = make(image_folder, out=tmp_path / "4", seed=1)
    assert contents(one) == contents(three)
    assert contents(one)["shard-00000.tar"] != contents(other)["shard-00000.tar"]
    keys = [source.name(index) for source in [ShardSource(one, SIZE)] for index in range(41)]
    assert keys != sorted(keys), "the samples are shuffled over the shards"


def test_an_interrupted_run_resumes(image_folder, make, tmp_path):
    whole, manifest = make(image_folder, out=tmp_path / "whole")
    part, _ = make(image_folder, out=tmp_path / "part")
    # As after a kill in shard 3: no manifest, records of the complete shards, half a file.
    (part / "dataset.json").unlink()
    for shard in manifest.shards:
        record = {"shard": vars(shard), "counts": [], "skipped": []}
        if shard.name != "shard-00003.tar":
            (part / shard.name).with_suffix(".done").write_text(json.dumps(record))
    kept = part / "shard-00000.tar"
    os.utime(kept, (1, 1))
    (part / "shard-00003.tar").unlink()
    (part / "shard-00003.tar.partial").write_bytes(b"half")
    make(image_folder, out=part)
    assert kept.stat().st_mtime == 1, "a complete shard is not made again"
    assert contents(part)["shard-00003.tar"] == contents(whole)["shard-00003.tar"]
    assert not list(part.glob("*.partial")) and not list(part.glob("*.done"))


def test_a_killed_process_resumes(process, image_folder, tmp_path):
    """A real process, killed at two points, then run to its end."""
    command = ("shards", image_folder, "killed", "--image-size", 200, "--per-shard", 2, "--workers", 1)
    for delay in (0.0, 0.1):
        running = process(*command)
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("killed/*.done")) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delay)
        running.signal(signal.SIGKILL)
        running.wait()
        running.output.unlink()
    assert process(*command).wait() == 0
    assert process("shards", image_folder, "whole", *command[3:]).wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_folder_of_other_shards_is_refused(image_folder, make, tmp_path, mentions):
    out, _ = make(image_folder)
    before = contents(out)
    make(image_folder)
    assert contents(out) == before, "the set is complete"
    with pytest.raises(UserError, match=mentions(out, "other")):
        make(image_folder, seed=3)
    shutil.copytree(image_folder, tmp_path / "more")
    Image.new("RGB", (40, 40)).save(tmp_path / "more" / "class0" / "new.png")
    with pytest.raises(UserError, match=mentions(out, "other")):
        make(tmp_path / "more")
    assert contents(out) == before
    (out / "plan.json").unlink()
    with pytest.raises(UserError, match=mentions(out, "unknown")):
        make(image_folder)


@pytest.mark.parametrize("format", ["raw", "cropped-jpeg", "original"])
def test_broken_images_are_skipped_counted_and_named(format, image_folder, make, tmp_path):
    folder = tmp_path / "some"
    shutil.copytree(image_folder, folder)
    truncated = folder / "class1" / "001.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-200])
    (folder / "class2" / "002.jpg").write_text("not a picture\n")
    out, manifest = make(folder, format, workers=2)
    assert manifest.skipped == 2 and manifest.samples == 39
    assert manifest.classes == {"class0": 14, "class1": 13, "class2": 12}
    lines = (out / "skipped.log").read_text().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("class1/001.jpg: ") and "truncated" in lines[0]
    assert lines[1].startswith("class2/002.jpg: ")
    source = ShardSource(out, SIZE)
    good = [index for index in range(41) if open_(folder).name(index) not in ("class1/001.jpg", "class2/002.jpg")]
    if format != "cropped-jpeg":
        assert torch.equal(source.read(range(39))[0], open_(folder).read(good)[0])


def open_(folder):
    return open_source("folder", str(folder), SIZE, "train")


def test_a_folder_of_broken_images_is_refused(make, tmp_path, mentions):
    (tmp_path / "bad" / "a").mkdir(parents=True)
    (tmp_path / "bad" / "a" / "0.jpg").write_text("no")
    with pytest.raises(UserError, match=mentions(1, "a/0.jpg")):
        make(tmp_path / "bad")


def test_odd_images_in_original_shards_are_pngs_with_the_same_pixels(make, odd_images):
    out, manifest = make(odd_images, "original")
    assert manifest.skipped == 0
    folder, source = open_(odd_images), ShardSource(out, SIZE)
    assert torch.equal(source.read(range(len(source)))[0], folder.read(range(len(folder)))[0])
    for index in range(len(source)):
        name = folder.name(index)
        with Image.open(io.BytesIO(source.encoded(index)[0])) as stored:
            plain = "jpeg" in name
            assert (stored.format, stored.mode) == (("JPEG", stored.mode) if plain else ("PNG", "RGB")), name
            if plain:
                assert bytes(source.encoded(index)[0]) == (odd_images / name).read_bytes()


@pytest.mark.parametrize(
    "settings, token",
    [
        ({"format": "zip"}, "original, cropped-jpeg, raw"),
        ({"format": "raw", "image_size": 0}, "--image-size"),
        ({"format": "cropped-jpeg", "quality": 80}, "--quality"),
        ({"format": "raw", "seed": -1}, "--seed"),
        ({"format": "raw", "per_shard": 0}, "--per-shard"),
    ],
)
def test_invalid_settings_are_refused(settings, token):
    with pytest.raises(UserError, match=token):
        Settings(**settings)


def test_a_killed_worker_is_one_error_line_and_the_run_can_resume(image_folder, make, tmp_path, monkeypatch, mentions):
    from unite_fast.data_pipeline.shards import write

    real = write._encode

    def deadly(data, name, settings):
        if name == "class2/038.jpg":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(data, name, settings)

    monkeypatch.setattr(write, "_encode", deadly)
    with pytest.raises(UserError, match=mentions("killed", "--workers")) as caught:
        make(image_folder, workers=1)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(write, "_encode", real)
    assert make(image_folder)[1].samples == 41


def test_a_full_disk_is_one_error_line(command, image_folder):
    ended = command("shards", image_folder, "/dev/full/set")
    assert ended.status == 2 and "/dev/full/set" in ended.err and len(ended.err.splitlines()) == 1


def test_read_into_agrees_with_read(shards):
    source = ShardSource(shards("raw"), SIZE)
    image = np.empty((3, SIZE, SIZE), np.uint8)
    label = source.read_into(7, image)
    images, labels = source.read([7])
    assert label == labels[0] and np.array_equal(image, images[0])
