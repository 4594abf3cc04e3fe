"""Image grids, loss curves, image files."""

import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image

from unite_fast.errors import UserError
from unite_fast.utils.files import BEGINNINGS
from unite_fast.utils.images import grid, pairs, save_curves, save_images, save_pairs


def flat(*colours: int, size: int) -> torch.Tensor:
    """Images of one colour each."""
    return torch.tensor(colours, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size)


@pytest.mark.parametrize(("size", "gap", "factor"), [(8, 1, 6), (10, 1, 5), (47, 1, 2), (48, 2, 1), (64, 2, 1)])
def test_images_stand_row_by_row_on_white(size, gap, factor):
    picture = np.asarray(grid(flat(10, 20, 30, 40, 50, size=size), columns=3))
    cell = size + gap
    assert picture.shape == ((2 * cell + gap) * factor, (3 * cell + gap) * factor, 3)
    small = picture[::factor, ::factor]
    assert np.array_equal(np.kron(small, np.ones((factor, factor, 1), np.uint8)), picture), "enlarged without blur"
    assert (small[gap : gap + size, gap : gap + size] == 10).all()
    assert (small[gap : gap + size, gap + 2 * cell :][:, :size] == 30).all()
    assert (small[gap + cell : cell + gap + size, gap + cell :][:, :size] == 50).all()
    inside = np.zeros(small.shape[:2], bool)
    for i in range(5):
        top, left = gap + i // 3 * cell, gap + i % 3 * cell
        inside[top : top + size, left : left + size] = True
    assert (small[~inside] == 255).all()


def test_channels_are_in_order():
    image = torch.zeros(1, 3, 48, 48, dtype=torch.uint8)
    image[:, 0] = 200
    image[:, 2] = 100
    assert grid(image, 1).getpixel((20, 20)) == (200, 0, 100)


def test_each_original_stands_above_its_reconstruction():
    picture = np.asarray(pairs(flat(1, 2, 3, size=48), flat(101, 102, 103, size=48), columns=2))
    places = picture[10::50, 10::50, 0]
    # Three pairs in two columns: the last row of originals and of reconstructions has one image, without a gap between.
    assert [row.tolist() for row in places] == [[1, 2], [101, 102], [3, 103]]


@pytest.mark.parametrize("more", [{"lpips": 0.0}, {"lpips": 0.3}, {"cross_entropy": 0.3}])
def test_curves_are_drawn(tmp_path, more):
    rows = [
        {"step": step, "l1": 1 / step, "flow": 2 / step, "grad_norm": 1.0, "lr": 1e-4, **more} for step in range(1, 20)
    ]
    save_curves(rows, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width == pytest.approx(320 * (5 if any(more.values()) else 4), abs=2)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_a_single_row_can_be_drawn(tmp_path):
    save_curves([{"step": 1, "l1": 0.1, "flow": 0.1, "grad_norm": 1.0, "lr": 0.0, "lpips": 0.0}], tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").width > 1000


@pytest.fixture
def images():
    return torch.randint(256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_an_npz_holds_images_and_labels(tmp_path, images):
    save_images(images, torch.tensor([3, 1, 4, 1]), tmp_path / "new" / "a.npz", 10)
    with np.load(tmp_path / "new" / "a.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], images.numpy().transpose(0, 2, 3, 1))
        assert file["arr_1"].tolist() == [3, 1, 4, 1]


def test_a_folder_holds_each_image_by_number_and_class(tmp_path, images):
    for _ in range(2):  # twice: the folder may exist
        save_images(images, torch.tensor([3, 1, 4, 1]), tmp_path / "new" / "folder", 10)
    names = sorted(os.listdir(tmp_path / "new" / "folder"))
    assert names == ["000000_class3.png", "000001_class1.png", "000002_class4.png", "000003_class1.png"]
    for name, image in zip(names, images, strict=True):
        with Image.open(tmp_path / "new" / "folder" / name) as picture:
            assert np.array_equal(np.asarray(picture), image.permute(1, 2, 0).numpy())


def test_images_of_two_calls_are_not_mixed_in_one_folder(tmp_path, images, mentions):
    """Who reads the folder could not tell them apart. Other files stay."""
    folder = tmp_path / "folder"
    save_images(images, torch.tensor([3, 1, 4, 1]), folder, 10)
    (folder / "notes_class1.png").touch()
    for labels in (torch.tensor([3, 1, 4]), torch.tensor([3, 1, 4, 2])):
        with pytest.raises(UserError, match=mentions(folder, "000003_class1.png", "--out")):
            save_images(images[: len(labels)], labels, folder, 10)
    assert len(os.listdir(folder)) == 5


def test_a_png_holds_all_images(tmp_path, images):
    save_images(images, torch.zeros(4), tmp_path / "a.png", 3)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == ((3 * 9 + 1) * 6, (2 * 9 + 1) * 6)


@pytest.mark.parametrize("name", ["a.jpg", "a.PNG", "a.npy", "a.png.gz"])
def test_another_suffix_is_refused_before_anything_is_written(tmp_path, images, name, mentions):
    with pytest.raises(UserError, match=mentions(tmp_path / "new" / name, ".png", ".npz", "folder")):
        save_images(images, torch.zeros(4), tmp_path / "new" / name, 3)
    with pytest.raises(UserError, match=mentions(tmp_path / "new" / name, ".png")):
        save_pairs(images, images, tmp_path / "new" / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a.png", "a.npz"])
def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path, images, name, mentions, full_disk):
    np.savez(tmp_path / "a.npz", arr_0=0)
    (tmp_path / "a.png").write_bytes(BEGINNINGS[".png"])
    old = (tmp_path / name).read_bytes()
    with pytest.raises(UserError, match=mentions(tmp_path / name, os.strerror(errno.ENOSPC))):
        save_images(images, torch.zeros(4), tmp_path / name, 3)
    assert (tmp_path / name).read_bytes() == old and sorted(os.listdir(tmp_path)) == ["a.npz", "a.png"]


def test_a_file_where_a_folder_should_be_is_named(tmp_path, images, mentions):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=mentions(tmp_path / "file" / "a.png")):
        save_images(images, torch.zeros(4), tmp_path / "file" / "a.png", 3)
