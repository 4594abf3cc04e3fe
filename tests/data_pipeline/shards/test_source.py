"""Read shards: numbering of samples, what DALI and webdataset read, and each kind of damage."""

import errno
import json
import os
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch

from unite_fast.data_pipeline import Loader, UnreadableSample, dali, open_source
from unite_fast.data_pipeline.shards.manifest import Index, Shard, index_path, read_index
from unite_fast.data_pipeline.shards.source import ShardSource
from unite_fast.data_pipeline.shards.verify import scan, unchecked, verify_shards
from unite_fast.errors import UserError

SIZE = 32


@pytest.fixture
def damaged(shards, tmp_path):
    """Copies a shard set, which the test then damages."""

    def copy(format="original"):
        return shutil.copytree(shards(format), tmp_path / "copy")

    return copy


def open_(folder):
    return open_source("shards", str(folder), SIZE, "train")


def without_hashes(folder):
    """As an earlier version made the set: no hash of the manifest and of the indices, so that other checks see more."""
    tree = json.loads((folder / "dataset.json").read_text())
    tree.pop("sha256")
    for shard in tree["shards"]:
        shard.pop("index_sha256")
    (folder / "dataset.json").write_text(json.dumps(tree))
    return folder


def error_of(folder):
    with pytest.raises(UserError) as caught:
        open_(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_sample_has_the_same_number_in_every_set(image_folder, make, tmp_path):
    sets = [make(image_folder, out=tmp_path / str(n), per_shard=n, seed=n)[0] for n in (3, 7, 100)]
    first, *others = [ShardSource(folder, SIZE).read(range(41)) for folder in sets]
    for images, labels in others:
        assert torch.equal(images, first[0]) and torch.equal(labels, first[1])


def test_length_names_classes_and_sizes(shards):
    source = open_(shards("raw"))
    assert (len(source), source.image_size, source.workers) == (41, SIZE, "threads")
    assert source.class_names == ["class0", "class1", "class2"] and source.class_counts() == [14, 14, 13]
    names = [source.name(index) for index in range(41)]
    assert len(set(names)) == 41 and names[5].startswith("shard-0000") and names[5].endswith(":000000000005")
    assert open_(shards("original")).workers == "processes"
    assert ShardSource(shards("raw"), 0).image_size == SIZE
    assert ShardSource(shards("original"), 0).image_size == 256


def test_the_webdataset_library_reads_our_shards(shards):
    import webdataset

    source = open_(shards("original"))
    paths = sorted(str(path) for path in shards("original").glob("*.tar"))
    samples = {}
    for sample in webdataset.WebDataset(paths, shardshuffle=False):
        samples[int(sample["__key__"])] = (sample["jpg"], int(sample["cls"]))
    assert sorted(samples) == list(range(41))
    for index in range(41):
        data, label = source.encoded(index)
        assert samples[index] == (bytes(data), label)


@pytest.mark.skipif(dali.missing() is not None, reason="NVIDIA DALI is not installed")
def test_dali_reads_our_shards_by_our_indices(shards):
    from nvidia.dali import Pipeline, fn

    source = open_(shards("original"))
    paths = sorted(str(path) for path in shards("original").glob("*.tar"))
    pipeline = Pipeline(41, 1, None)
    with pipeline:
        indices = [path[:-4] + ".idx" for path in paths]
        pipeline.set_outputs(*fn.readers.webdataset(paths=paths, index_paths=indices, ext=["jpg", "cls"]))
    pipeline.build()
    files, labels = pipeline.run()
    actual = sorted((bytes(np.asarray(files[i])), int(bytes(np.asarray(labels[i])))) for i in range(41))
    assert actual == sorted((bytes(data), label) for data, label in map(source.encoded, range(41)))


def test_the_index_agrees_with_tarfile(shards):
    for path in shards("raw").glob("*.tar"):
        assert scan(path).text() == read_index(index_path(path)).text() == index_path(path).read_text()


def test_an_index_without_samples():
    nothing = np.zeros((0, 2), np.int64)
    assert Index(np.zeros(0, np.int64), nothing, nothing, []).text() == "v1.2 0\n"


def test_each_split_has_its_folder(shards, tmp_path):
    shutil.copytree(shards("raw"), tmp_path / "both" / "train")
    shutil.copytree(shards("original"), tmp_path / "both" / "val")
    assert open_source("shards", str(tmp_path / "both"), SIZE, "train").manifest.format == "raw"
    assert open_source("shards", str(tmp_path / "both"), SIZE, "test").manifest.format == "original"
    assert open_source("shards", str(tmp_path / "both" / "val"), SIZE, "train").manifest.format == "original"


def test_a_folder_without_a_manifest_and_another_size_are_refused(tmp_path, shards, mentions):
    assert re.search(mentions("dataset.json", tmp_path), error_of(tmp_path))
    with pytest.raises(UserError, match=mentions("image_size", 64, 32)):
        open_source("shards", str(shards("raw")), 64, "train")


def test_a_missing_shard_is_named(damaged, mentions):
    folder = damaged()
    (folder / "shard-00002.tar").unlink()
    assert re.search(mentions("shard-00002.tar", os.strerror(errno.ENOENT)), error_of(folder))
    assert any("shard-00002.tar" in fault for fault in verify_shards(folder, 2))


def test_a_truncated_shard_is_named(damaged, mentions):
    folder = damaged()
    os.truncate(folder / "shard-00001.tar", 5000)
    assert re.search(mentions("shard-00001.tar", 5000), error_of(folder))
    assert re.search(mentions("shard-00001.tar", 5000), verify_shards(folder, 1)[0])


def test_a_missing_truncated_or_wrong_index_is_named(damaged, mentions):
    folder = damaged()
    index = folder / "shard-00001.idx"
    text = index.read_text()
    for wrong in ("", text[:100], text.replace("v1.2", "v1.1"), "v1.2 1\nx\n", text.replace("cls 512", "cls x")):
        index.write_text(wrong)
        assert "shard-00001.idx" in error_of(folder)
    lines = text.splitlines()
    index.write_text("\n".join([f"v1.2 {len(lines) - 2}", *lines[1:-1]]) + "\n")
    assert re.search(mentions("shard-00001.idx", 8, 9), error_of(folder))
    index.unlink()
    assert re.search(mentions("shard-00001.idx", os.strerror(errno.ENOENT)), error_of(folder))


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.update(samples=42),
        lambda tree: tree.update(format="zip"),
        lambda tree: tree.update(classes=["a"]),
        lambda tree: tree["shards"].pop(),
        lambda tree: tree["shards"][0].update(name="../../secret.tar"),
        lambda tree: tree["shards"][0].update(name="shard-00000.tar; rm -r x"),
        lambda tree: tree.pop("seed"),
        lambda tree: tree["shards"][0].update(name="shard-0000\u0663.tar"),
        lambda tree: tree["shards"][0].update(name="shard-00001.tar"),
        lambda tree: tree["shards"][0].update(name="shard-00000.tar\n"),
        *(lambda tree, n=n: tree["shards"][0].update(samples=n) for n in (-1, "1_0", 9.0, 2**70, True, None)),
        *(lambda tree, n=n: tree["shards"][0].update(bytes=n) for n in (-1, "1_0", 2**70, None)),
        *(lambda tree, n=n: tree.update(seed=n) for n in (-1, 1.5, "1", 2**64)),
        *(lambda tree, n=n: tree.update(image_size=n) for n in (-1, 7, 10**9, "32")),
        *(lambda tree, n=n: tree.update(skipped=n) for n in (-1, None, [])),
        lambda tree: tree.update(classes={"class0": -14, "class1": 14, "class2": 41}),
        lambda tree: tree.update(classes={"class0": "14", "class1": 14, "class2": 13}),
    ],
)
def test_an_invalid_manifest_is_refused(damaged, change, mentions):
    folder = without_hashes(damaged())
    tree = json.loads((folder / "dataset.json").read_text())
    change(tree)
    (folder / "dataset.json").write_text(json.dumps(tree))
    assert "dataset.json" in error_of(folder)
    (folder / "dataset.json").write_text("[]")
    assert "dataset.json" in error_of(folder)
    (folder / "dataset.json").write_text("{")
    assert re.search(mentions("dataset.json", "JSON"), error_of(folder))


def test_verify_finds_one_changed_byte_and_says_where(damaged, command):
    folder = damaged("raw")
    assert verify_shards(folder, 2) == []
    assert command("shards", "verify", folder).status == 0
    path = folder / "shard-00003.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    ended = command("shards", "verify", folder)
    assert ended.status == 1 and re.match(r"shard-00003\.tar .*[0-9a-f]{64}", ended.out)
    assert len(ended.out.splitlines()) == 1


def test_verify_compares_index_and_counts(damaged, mentions):
    folder = damaged()
    index = folder / "shard-00000.idx"
    index.write_text(index.read_text().replace("cls 512", "cls 513", 1))
    (fault,) = verify_shards(folder, 1)
    assert re.search(mentions("shard-00000.idx", "shard-00000.tar"), fault)
    shutil.rmtree(folder)
    folder = without_hashes(damaged())
    tree = json.loads((folder / "dataset.json").read_text())
    tree["classes"] = {"class0": 15, "class1": 13, "class2": 13}
    (folder / "dataset.json").write_text(json.dumps(tree))
    first, second = verify_shards(folder, 1)
    assert re.search(mentions("class0", 14, 15), first)
    assert re.search(mentions("class1", 14, 13), second)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder, tree: tree.update(classes=dict(reversed(tree["classes"].items()))),
        lambda folder, tree: tree.update(classes={name.upper(): count for name, count in tree["classes"].items()}),
        lambda folder, tree: tree.update(seed=7),
        lambda folder, tree: tree["shards"][0].update(sha256="0" * 64),
        lambda folder, tree: tree.update(sha256="0" * 64),
        lambda folder, tree: tree.pop("sha256"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(damaged, change):
    """The order of the class names gives the labels."""
    folder = damaged()
    tree = json.loads((folder / "dataset.json").read_text())
    change(folder, tree)
    (folder / "dataset.json").write_text(json.dumps(tree))
    assert "dataset.json" in error_of(folder)
    with pytest.raises(UserError, match=r"dataset\.json"):
        verify_shards(folder, 1)


def test_an_index_that_was_changed_is_refused(damaged, mentions):
    """Two images in each other's place would be read without a complaint, each with the other's number."""
    folder = damaged("raw")
    index = folder / "shard-00000.idx"
    text = index.read_text()
    one, other = (line.split()[3][:12] for line in text.splitlines()[1:3])
    index.write_text(text.replace(one, "x").replace(other, one).replace("x", other))
    assert re.search(mentions(index, "SHA-256"), error_of(folder))
    assert re.search(mentions("shard-00000.idx", "SHA-256"), verify_shards(folder, 1)[0])
    assert len(open_(without_hashes(folder))) == 41, "nothing else shows it when a set is opened"
    assert re.search(mentions("shard-00000.idx", "shard-00000.tar"), verify_shards(folder, 1)[0])


def test_verify_says_what_it_cannot_check(damaged, command, mentions):
    folder = damaged()
    assert unchecked(folder) == [] and len(command("shards", "verify", folder).out.splitlines()) == 1
    ended = command("shards", "verify", without_hashes(folder))
    assert ended.status == 0 and len(open_(folder)) == 41
    assert re.search(mentions("dataset.json", "class"), ended.out) and re.search(mentions("indices"), ended.out)


ENTRY = Shard("shard-00000.tar", 2, 10_000, "0" * 64)
LINES = (
    "cls 512 1 000000000000.cls jpg 1536 100 000000000000.jpg",
    "cls 2560 2 000000000007.cls png 3584 99 000000000007.png",
)


def test_an_index_is_parsed(tmp_path):
    (tmp_path / "a.idx").write_text("v1.2 2\n" + "\n".join(LINES))
    index = read_index(tmp_path / "a.idx", ENTRY)
    assert index.keys.tolist() == [0, 7] and index.extensions == ["jpg", "png"]
    assert (index.labels.tolist(), index.images.tolist()) == ([[512, 1], [2560, 2]], [[1536, 100], [3584, 99]])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *(
            ("512", number)
            for number in ("-512", "+512", "5_12", "0x200", "5e2", "512.0", "\u0665\u0661\u0662", "", "511")
        ),
        *(("3584", number) for number in ("9999999999999999999999", "18446744073709551617", "9950", "2561", "1_0")),
        *(("99 ", number) for number in ("6417 ", "-1 ", "9223372036854775807 ")),
        ("v1.2 2", "v1.2 3"),
        ("v1.2 2", "v1.2 1"),
        ("v1.2 2", "v1.2 -2"),
        ("v1.2 2", "v1.2 " + "9" * 5000),
        ("v1.2 2", "v1.2 2 2"),
        ("000000000007.png", "000000000008.png"),
        ("000000000007", "9" * 30),
        ("7.png", "7.jpg"),
        ("png", "gif"),
        ("cls 2560", "cls 1536"),
        ("\n", " "),
        ("cls 512", "\0cls 512"),
    ],
)
def test_an_index_with_other_numbers_is_refused(tmp_path, old, new, mentions):
    text = "v1.2 2\n" + "\n".join(LINES) + "\n"
    assert old in text
    (tmp_path / "a.idx").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=mentions(tmp_path / "a.idx")) as refusal:
        read_index(tmp_path / "a.idx", ENTRY)
    assert "\n" not in str(refusal.value)


def test_a_pipe_is_no_index_and_no_manifest(damaged):
    folder = damaged()
    for name in ("shard-00001.idx", "dataset.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert name in error_of(folder)


def spoil(folder, name, data):
    """Overwrite the first bytes of a member of one of the tar files."""
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            offsets = [member.offset_data for member in tar if member.name == name]
        if offsets:
            with open(path, "r+b") as file:
                file.seek(offsets[0])
                file.write(data)
            return
    raise AssertionError(f"{name} is in no shard of {folder}")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_damaged_after_the_set_was_made_is_skipped(damaged, workers):
    folder = damaged()
    spoil(folder, "000000000007.jpg", b"no picture")
    source = open_(folder)
    with pytest.raises(UnreadableSample, match=r"shard-\d+\.tar:000000000007: "):
        source.read([7])
    with Loader(source, 41, 0, workers) as loader:
        ids = next(loader).ids.tolist()
    assert sorted(ids) == sorted([*range(7), 8, *range(8, 41)])
    assert list(loader.skipped) == [source.name(7)]


def test_a_wrong_label_or_length_is_an_unreadable_sample(damaged, mentions):
    folder = without_hashes(damaged("raw"))
    spoil(folder, "000000000004.cls", b"9")
    for index in folder.glob("*.idx"):
        index.write_text(re.sub(r" 3072 (000000000005\.)", r" 3071 \1", index.read_text()))
    source = open_(folder)
    with pytest.raises(UnreadableSample, match=mentions("000000000004", "b'9'")):
        source.read([4])
    with pytest.raises(UnreadableSample, match=mentions("000000000005", 3071, 3072)):
        source.read([5])
    assert source.read([6])[0].shape == (1, 3, SIZE, SIZE)


@pytest.mark.parametrize("format, workers", [("raw", 0), ("raw", 2), ("original", 2)])
def test_a_shard_truncated_or_deleted_during_a_run_stops_it(damaged, format, workers):
    folder = damaged(format)
    source, unread = open_(folder), open_(folder)
    for path in folder.glob("*.tar"):
        os.truncate(path, 600)
    with (
        Loader(source, 8, 0, workers) as loader,
        pytest.raises(UserError, match=r"shard-\d+\.tar.*--resume") as caught,
    ):
        next(loader)
    assert "\n" not in str(caught.value)
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match=rf"shard-\d+\.tar.*{os.strerror(errno.ENOENT)}.*--resume"):
        unread.read([0])


def test_the_number_of_open_shard_files_is_limited(image_folder, make, monkeypatch):
    from unite_fast.data_pipeline.shards import source as module

    monkeypatch.setattr(module, "_OPEN_SHARDS", 2)
    out, manifest = make(image_folder, per_shard=1)
    assert len(manifest.shards) == 41
    source = ShardSource(out, SIZE)
    before = len(os.listdir("/proc/self/fd"))
    source.read(range(41))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_duplicate_key_is_refused(damaged, mentions):
    folder = damaged()
    index = folder / "shard-00000.idx"
    lines = index.read_text().splitlines()
    lines[2] = lines[1]
    index.write_text("\n".join(lines) + "\n")
    assert re.search(mentions(folder, "sample"), error_of(folder))


def test_tar_files_hold_only_their_samples(shards):
    with tarfile.open(shards("raw") / "shard-00000.tar") as tar:
        members = tar.getmembers()
    assert len(members) == 18
    assert {(member.mtime, member.uid, member.mode, member.uname) for member in members} == {(0, 0, 0o644, "")}
