"""The inputs of `unite-fast shards`: folders, ImageNet's tar files, Parquet files."""

import io
import json
import shutil
import tarfile

import pytest
import torch

from unite_fast.data_pipeline import open_source
from unite_fast.data_pipeline.shards.raw_images import find_raw_images
from unite_fast.data_pipeline.shards.source import ShardSource
from unite_fast.errors import UserError

SIZE = 32


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def tar_of(files):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, contents in files:
            add(tar, name, contents)
    return data.getvalue()


@pytest.fixture
def by_class(image_folder):
    return {
        folder.name: [(file.name, file.read_bytes()) for file in sorted(folder.iterdir())]
        for folder in sorted(image_folder.iterdir())
    }


@pytest.fixture
def expected(image_folder):
    return open_source("folder", str(image_folder), SIZE, "train").read(range(41))


def assert_same(out, expected):
    images, labels = ShardSource(out, SIZE).read(range(41))
    assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])


def test_the_tar_of_class_tars_is_the_folder(by_class, expected, make, tmp_path):
    """The layout of ILSVRC2012_img_train.tar."""
    path = tmp_path / "train.tar"
    files = [(f"{name}.tar", tar_of([*files, ("notes.txt", b"x")])) for name, files in reversed(by_class.items())]
    path.write_bytes(tar_of(files))
    out, manifest = make(path, workers=2)
    assert list(manifest.classes) == ["class0", "class1", "class2"]
    assert_same(out, expected)


def test_a_folder_of_class_tars_is_the_folder(by_class, expected, make, tmp_path):
    (tmp_path / "tars").mkdir()
    for name, files in by_class.items():
        (tmp_path / "tars" / f"{name}.tar").write_bytes(tar_of(files))
    assert_same(make(tmp_path / "tars")[0], expected)


def test_a_tar_of_folders_is_the_folder(by_class, expected, make, tmp_path):
    path = tmp_path / "all.tar"
    files = [(f"deep/{name}/{file}", data) for name, files in by_class.items() for file, data in files]
    path.write_bytes(tar_of([*files, ("deep/class0/._000.jpg", b"metadata of a Mac")]))
    assert_same(make(path)[0], expected)


def test_a_flat_tar_with_a_list_of_labels_is_the_folder(by_class, expected, make, tmp_path, mentions):
    """The layout of ILSVRC2012_img_val.tar; the list is in the order of names, which need not be that of the file."""
    pairs = sorted((name, data, class_name) for class_name, files in by_class.items() for name, data in files)
    path, labels = tmp_path / "val.tar", tmp_path / "labels.txt"
    path.write_bytes(tar_of([(name, data) for name, data, _ in reversed(pairs)]))
    labels.write_text("".join(f"{class_name}\n" for *_, class_name in pairs))
    out, manifest = make(path, labels=labels)
    assert manifest.classes == {"class0": 14, "class1": 14, "class2": 13}
    images = ShardSource(out, SIZE).read(range(41))[0]
    folder_order = [name for files in by_class.values() for name, _ in files]
    assert torch.equal(images[[int(name[:3]) for name in folder_order]], expected[0])
    labels.write_text("class0\n")
    with pytest.raises(UserError, match=mentions(labels, 1, 41)):
        make(path, labels=labels, out=tmp_path / "other")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.8])
def test_a_truncated_tar_is_one_error_line(by_class, make, tmp_path, share, mentions):
    path = tmp_path / "train.tar"
    whole = tar_of([(f"{name}.tar", tar_of(files)) for name, files in by_class.items()])
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=mentions(path)) as caught:
        make(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("blocks", [3, 10])
def test_a_truncated_tar_within_a_tar_is_named(by_class, make, tmp_path, blocks, mentions):
    inner = {name: tar_of(files) for name, files in by_class.items()}
    inner["class1"] = inner["class1"][: 512 * blocks]
    (tmp_path / "train.tar").write_bytes(tar_of([(f"{name}.tar", data) for name, data in inner.items()]))
    with pytest.raises(UserError, match=mentions(tmp_path / "train.tar", "class1.tar")):
        make(tmp_path / "train.tar")


def test_a_path_without_images_is_refused(make, tmp_path, mentions):
    (tmp_path / "text.tar").write_text("no tar file at all\n" * 100)
    with pytest.raises(UserError, match=mentions(tmp_path / "text.tar")):
        make(tmp_path / "text.tar")
    (tmp_path / "empty.tar").write_bytes(tar_of([]))
    with pytest.raises(UserError, match=mentions(tmp_path / "empty.tar")):
        make(tmp_path / "empty.tar")
    with pytest.raises(UserError, match=mentions(tmp_path / "nowhere")):
        make(tmp_path / "nowhere")


def test_each_split_has_its_folder(image_folder, make, tmp_path):
    for split, names in (("train", ("class0", "class1", "class2")), ("val", ("class1",))):
        for name in names:
            shutil.copytree(image_folder / name, tmp_path / "both" / split / name)
    _, train = make(tmp_path / "both", out=tmp_path / "1")
    _, test = make(tmp_path / "both", split="test", out=tmp_path / "2")
    assert (train.samples, test.samples) == (41, 14)
    assert list(test.classes) == list(train.classes), "a label means the same in both"


@pytest.fixture
def parquet_folder(by_class, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    def write(as_struct=True, names=True):
        folder = tmp_path / "parquet"
        (folder / "data").mkdir(parents=True)
        rows = [(data, label) for label, files in enumerate(by_class.values()) for _, data in files]
        image = [{"bytes": data, "path": None} if as_struct else data for data, _ in rows]
        table = pyarrow.table({"image": image, "label": [label for _, label in rows]})
        if names:
            info = {"info": {"features": {"label": {"names": list(by_class), "_type": "ClassLabel"}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        parquet.write_table(table[:30], folder / "data" / "train-00000-of-00002.parquet", row_group_size=7)
        parquet.write_table(table[30:], folder / "data" / "train-00001-of-00002.parquet")
        parquet.write_table(table[:2], folder / "data" / "validation-00000-of-00001.parquet")
        return folder

    return write


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet_files_are_the_folder(parquet_folder, expected, make, as_struct):
    out, manifest = make(parquet_folder(as_struct), workers=2)
    assert list(manifest.classes) == ["class0", "class1", "class2"]
    assert_same(out, expected)
    assert not (out / "staging").exists()


def test_parquet_splits_and_classes_without_names(parquet_folder, make, tmp_path):
    folder = parquet_folder(names=False)
    assert make(folder, split="test", out=tmp_path / "val")[1].samples == 2
    assert list(make(folder)[1].classes) == ["0", "1", "2"]


def test_a_damaged_parquet_file_is_named(parquet_folder, make, tmp_path, mentions):
    folder = parquet_folder()
    path = folder / "data" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=mentions(path)) as caught:
        make(folder)
    assert "\n" not in str(caught.value)


def test_parquet_without_the_columns_is_refused(make, tmp_path, mentions):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    (tmp_path / "other").mkdir()
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "other" / "train.parquet")
    with pytest.raises(UserError, match=mentions("train.parquet", "image", "label")):
        make(tmp_path / "other")


def test_the_fingerprint_tells_listings_apart(image_folder, tmp_path):
    one = find_raw_images(image_folder, "train", None, tmp_path)
    shutil.copytree(image_folder, tmp_path / "same")
    assert find_raw_images(tmp_path / "same", "train", None, tmp_path).fingerprint() == one.fingerprint()
    (tmp_path / "same" / "class0" / "000.jpg").rename(tmp_path / "same" / "class0" / "0000.jpg")
    assert find_raw_images(tmp_path / "same", "train", None, tmp_path).fingerprint() != one.fingerprint()
