"""Grids and curves, pixel by pixel where that says something."""

import numpy as np
import pytest
import torch
from PIL import Image

from unite_fast.utils.images import grid, pairs, save_curves


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


def test_colours_are_in_order():
    image = torch.zeros(1, 3, 48, 48, dtype=torch.uint8)
    image[:, 0] = 200
    image[:, 2] = 100
    assert grid(image, 1).getpixel((20, 20)) == (200, 0, 100)


def test_each_original_stands_above_its_reconstruction():
    picture = np.asarray(pairs(flat(1, 2, 3, size=48), flat(101, 102, 103, size=48), columns=2))
    places = picture[10::50, 10::50, 0]
    # Three pairs in two columns: the last row of either kind has one image, and the grid is filled without a gap.
    assert [row.tolist() for row in places] == [[1, 2], [101, 102], [3, 103]]


@pytest.mark.parametrize("lpips", [0.0, 0.3])
def test_curves_are_drawn(tmp_path, lpips):
    rows = [
        {"step": step, "l1": 1 / step, "flow": 2 / step, "grad_norm": 1.0, "lr": 1e-4, "lpips": lpips}
        for step in range(1, 20)
    ]
    save_curves(rows, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width == pytest.approx(320 * (5 if lpips else 4), abs=2)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_a_single_row_can_be_drawn(tmp_path):
    save_curves([{"step": 1, "l1": 0.1, "flow": 0.1, "grad_norm": 1.0, "lr": 0.0, "lpips": 0.0}], tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").width > 1000
