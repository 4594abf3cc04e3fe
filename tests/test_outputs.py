"""What the commands read and write."""

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unite_fast.checkpoint.model_file import describe
from unite_fast.data_pipeline.image_folder import read_images
from unite_fast.errors import UserError
from unite_fast.sampling.sampler import choose_labels
from unite_fast.utils.files import check_target
from unite_fast.utils.images import save_images, save_pairs


@pytest.fixture
def images():
    return torch.randint(256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize(
    ("classes", "count", "labels"),
    [([], 7, [0, 1, 2, 3, 4, 0, 1]), ([3], 2, [3, 3]), ([3, 1, 4], 5, [3, 1, 4, 3, 1]), ([0, 2], 1, [0])],
)
def test_classes_are_taken_in_turn(classes, count, labels):
    chosen = choose_labels(classes, count, num_classes=5)
    assert chosen.tolist() == labels and chosen.dtype == torch.int64


@pytest.mark.parametrize("classes", [[5], [0, -1], [99999999999999999999]])
def test_classes_out_of_range_are_refused(classes, mentions):
    with pytest.raises(UserError, match=mentions("class", classes[-1], "0..4")):
        choose_labels(classes, 3, 5)


def test_an_npz_holds_images_and_labels_as_evaluations_want_them(tmp_path, images):
    save_images(images, torch.tensor([3, 1, 4, 1]), tmp_path / "new" / "a.npz", 10)
    with np.load(tmp_path / "new" / "a.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], images.numpy().transpose(0, 2, 3, 1))
        assert file["arr_1"].tolist() == [3, 1, 4, 1]


def test_a_folder_holds_each_image_by_number_and_class(tmp_path, images):
    for _ in range(2):  # twice, as the folder may be there
        save_images(images, torch.tensor([3, 1, 4, 1]), tmp_path / "new" / "folder", 10)
    names = sorted(os.listdir(tmp_path / "new" / "folder"))
    assert names == ["000000_class3.png", "000001_class1.png", "000002_class4.png", "000003_class1.png"]
    for name, image in zip(names, images, strict=True):
        with Image.open(tmp_path / "new" / "folder" / name) as picture:
            assert np.array_equal(np.asarray(picture), image.permute(1, 2, 0).numpy())


def test_a_png_holds_all_images(tmp_path, images):
    save_images(images, torch.zeros(4), tmp_path / "a.png", 3)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == ((3 * 9 + 1) * 6, (2 * 9 + 1) * 6)


@pytest.mark.parametrize("name", ["a.jpg", "a.PNG", "a.npy", "a.png.gz"])
def test_another_ending_is_refused_before_anything_is_written(tmp_path, images, name, mentions):
    with pytest.raises(UserError, match=mentions(tmp_path / "new" / name, ".png", ".npz", "folder")):
        save_images(images, torch.zeros(4), tmp_path / "new" / name, 3)
    with pytest.raises(UserError, match=mentions(tmp_path / "new" / name, ".png")):
        save_pairs(images, images, tmp_path / "new" / name)
    assert os.listdir(tmp_path) == []


def test_something_of_another_kind_in_the_way_is_refused(tmp_path, mentions):
    (tmp_path / "a.png").mkdir()
    (tmp_path / "file").touch()
    for out in (tmp_path / "a.png", tmp_path / "file"):
        with pytest.raises(UserError, match=mentions(out, "--out")):
            check_target(out)


@pytest.mark.parametrize("name", ["a.png", "a.npz"])
def test_a_full_disk_is_named(tmp_path, images, name, mentions):
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(UserError, match=mentions(tmp_path / name, os.strerror(errno.ENOSPC))):
        save_images(images, torch.zeros(4), tmp_path / name, 3)


def test_a_file_where_a_folder_should_be_is_named(tmp_path, images, mentions):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=mentions(tmp_path / "file" / "a.png")):
        save_images(images, torch.zeros(4), tmp_path / "file" / "a.png", 3)


def test_pictures_are_read_in_order_and_cropped(tmp_path):
    for name, value in (("a.png", 10), ("b.jpg", 200)):
        Image.new("RGB", (20, 12), (value, value, value)).save(tmp_path / name)
    images = read_images([tmp_path / "b.jpg", tmp_path / "a.png"], 8)
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [200, 10]


def test_a_description_says_step_size_and_settings(trained_folder, mentions):
    text = describe(trained_folder)
    assert re.match(mentions("step_00000020", "digits", 20), text)
    total, encoder, decoder = (int(part.replace(",", "")) for part in numbers_after(text, "parameters: "))
    assert 0 < total - encoder - decoder < 100, "the LayerNorm between them"
    assert "width: 16" in text and "batch_size: 8" in text


def numbers_after(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [word.strip("(),") for word in line.split() if word.strip("(),").replace(",", "").isdigit()]


def test_a_description_of_nothing_is_refused(tmp_path, mentions):
    with pytest.raises(UserError, match=mentions(tmp_path / "nothing")):
        describe(Path(tmp_path / "nothing"))
