"""IDX files: values, padding, labels, and each fault of a file."""

import gzip
import os
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from unite_fast.data_pipeline import open_source
from unite_fast.errors import UserError

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
CLASSES = np.array([0, 1, 2, 3, 1, 0], dtype=np.uint8)


def idx(values, type_code=8):
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, type_code, values.ndim, *values.shape) + values.tobytes()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / IMAGES).write_bytes(idx(PIXELS))
    (tmp_path / LABELS).write_bytes(idx(CLASSES))
    return tmp_path


def compress(folder):
    for name in (IMAGES, LABELS):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()


def open_(folder, size=5, split="train"):
    return open_source("idx", str(folder), size, split)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("size, rows, columns", [(8, (1, 2), (2, 2)), (9, (2, 2), (2, 3)), (5, (0, 0), (0, 1))])
def test_values_padding_and_labels(folder, compressed, size, rows, columns):
    if compressed:
        compress(folder)
    source = open_(folder, size)
    assert (len(source), source.image_size, source.class_names) == (6, size, ["0", "1", "2", "3"])
    images, labels = source.read([5, 2])
    assert images.shape == (2, 3, size, size) and images.dtype == torch.uint8
    expected = np.pad(PIXELS[[5, 2]], ((0, 0), rows, columns))
    for channel in range(3):
        np.testing.assert_array_equal(images[:, channel], expected)
    assert labels.tolist() == [0, 2]


def test_the_test_split_has_its_own_files(folder, mentions):
    with pytest.raises(UserError, match=mentions("t10k-images-idx3-ubyte", "t10k-images-idx3-ubyte.gz")):
        open_(folder, split="test")
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(PIXELS[:2]))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(CLASSES[:2]))
    assert len(open_(folder, split="test")) == 2


def test_the_training_labels_define_the_classes(folder, mentions):
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(PIXELS[:2]))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(CLASSES[:2]))
    assert open_(folder, split="test").class_names == ["0", "1", "2", "3"]
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([0, 9], np.uint8)))
    with pytest.raises(UserError, match=mentions(9, 3, folder / LABELS)):
        open_(folder, split="test")


def test_no_more_is_decompressed_than_the_header_says(folder, mentions):
    compress(folder)
    bomb = gzip.compress(idx(PIXELS) + bytes(10**8))
    (folder / f"{IMAGES}.gz").write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(UserError, match=mentions(folder / f"{IMAGES}.gz", "too long")):
        open_(folder)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()
    (folder / f"{IMAGES}.gz").write_bytes(gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, *[2**32 - 1] * 3)))
    with pytest.raises(UserError, match=mentions(folder / f"{IMAGES}.gz", "truncated")):
        open_(folder)


def test_a_pipe_is_refused(folder, mentions):
    (folder / IMAGES).unlink()
    os.mkfifo(folder / IMAGES)
    with pytest.raises(UserError, match=mentions(folder / IMAGES, "regular")):
        open_(folder)


def test_missing_labels_are_named(folder, mentions):
    (folder / LABELS).unlink()
    with pytest.raises(UserError, match=mentions(LABELS, f"{LABELS}.gz")):
        open_(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        open_(tmp_path / "nowhere")


def test_images_larger_than_image_size_are_refused(folder, mentions):
    with pytest.raises(UserError, match=mentions("image_size", 4, 5)):
        open_(folder, size=4)


WRONG = {
    "swapped files": (idx(CLASSES), "IDX file of 3 dimensions: it starts with 00000801, not 00000803"),
    "32-bit values": (idx(PIXELS.astype(">i4"), 0x0C), "starts with 00000c03"),
    "text": (b"<html>not found</html>", "IDX file"),
    "nothing": (b"", "truncated: 0 bytes"),
    "half a header": (idx(PIXELS)[:9], "truncated: 9 bytes, the header alone has 16"),
    "one byte short": (idx(PIXELS)[:-1], "truncated: its header promises 6 x 5 x 4 = 120 bytes, it holds 119"),
    "one byte long": (idx(PIXELS) + b"x", "too long"),
    "no images": (idx(PIXELS[:0]), "6 labels"),
    "one image less": (idx(PIXELS[:5]), "5 images"),
    "images of no height": (idx(PIXELS[:, :0]), "is empty"),
}


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_wrong_file_is_one_error_line(folder, fault, compressed):
    contents, message = WRONG[fault]
    (folder / IMAGES).write_bytes(contents)
    if compressed:
        compress(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_(folder)
    assert str(folder / IMAGES) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["short", "flipped", "not compressed"])
def test_damaged_compression_is_named(folder, damage, mentions):
    compress(folder)
    file = folder / f"{IMAGES}.gz"
    data = bytearray(file.read_bytes())
    if damage == "short":
        data = data[:-20]
    elif damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    else:
        data = idx(PIXELS)
    file.write_bytes(data)
    with pytest.raises(UserError, match=mentions(file)):
        open_(folder)


@pytest.mark.skipif("UNITE_FAST_FASHION_MNIST" not in os.environ, reason="UNITE_FAST_FASHION_MNIST names no folder")
@pytest.mark.parametrize("split, n", [("train", 60000), ("test", 10000)])
def test_fashion_mnist(split, n):
    source = open_(os.environ["UNITE_FAST_FASHION_MNIST"], 32, split)
    assert len(source) == n and len(source.class_names) == 10
    assert source.labels.bincount().tolist() == [n // 10] * 10
    images, _ = source.read(range(100))
    assert images.shape == (100, 3, 32, 32)
    assert (images[..., :2, :] == 0).all() and (images[..., -2:] == 0).all()
    # The mean of the training set is known: 0.2860 of white.
    assert source.images[:, 2:-2, 2:-2].float().mean().item() / 255 == pytest.approx(0.286, abs=2e-3)
