"""Save images: grids, loss curves, files."""

import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unite_fast.errors import require
from unite_fast.utils.file_lock import lock_output
from unite_fast.utils.files import atomic_write, check_npz, check_target, writing

GAP = 2
"""Pixels between the images of a grid; 1 if the images are enlarged."""
SAMPLES = "arr_0.npy"
"""The member of an .npz with the images of samples."""
IMAGE_NAME = re.compile(r"[0-9]{6,}_class[0-9]+\.png")
SMALLEST = 48
"""Images with a smaller side are enlarged by an integer factor, so that they can be seen."""


def image_file_name(index: int, label: int) -> str:
    """File name of a generated image."""
    return f"{index:06d}_class{label}.png"


def check_no_others(out: Path, labels: Tensor) -> None:
    """Check that a folder holds no generated images that images of these labels would not replace: nobody could tell
    them apart.

    Raises:
        UserError: it does.
    """
    if out.suffix or not out.is_dir():
        return
    names = {image_file_name(index, int(label)) for index, label in enumerate(labels.tolist())}
    others = sorted(name for name in os.listdir(out) if IMAGE_NAME.fullmatch(name) and name not in names)
    require(
        not others,
        f"{out} holds {len(others)} other images, first {others[:1]}; empty it, or choose another --out",
    )


def grid(images: Tensor, columns: int) -> Image.Image:
    """uint8 [n, 3, S, S] -> one image of all, row by row, on white."""
    n, _, size, _ = images.shape
    rows = -(-n // columns)
    factor = -(-SMALLEST // size)
    gap = GAP if factor == 1 else 1
    cell = size + gap
    canvas = torch.full((rows * cell + gap, columns * cell + gap, 3), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * cell, gap + i % columns * cell
        canvas[top : top + size, left : left + size] = image.permute(1, 2, 0)
    whole = Image.fromarray(canvas.numpy())
    return whole.resize((whole.width * factor, whole.height * factor), Image.Resampling.NEAREST)


def pairs(originals: Tensor, reconstructions: Tensor, columns: int) -> Image.Image:
    """A grid with each row of originals above the row of its reconstructions; both uint8 [n, 3, S, S]."""
    rows = zip(originals.split(columns), reconstructions.split(columns), strict=True)
    return grid(torch.cat([part for row in rows for part in row]), columns)


def save_images(images: Tensor, labels: Tensor, out: Path, columns: int) -> None:
    """Save images uint8 [n, 3, S, S] as one PNG grid, an .npz (arr_0 uint8 [n, S, S, 3], arr_1 labels) or a folder.

    Raises:
        UserError: see `check_target`; no space, or no permission.
    """
    check_target(out)
    if out.suffix == ".npz":
        check_npz(out, SAMPLES)
    with writing(out):
        (out.parent if out.suffix else out).mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        save_png(grid(images, columns), out)
    elif out.suffix == ".npz":
        with atomic_write(out) as partial, partial.open("wb") as file:
            np.savez(file, images.permute(0, 2, 3, 1).numpy(), labels.numpy())
    else:
        with lock_output(out):
            check_no_others(out, labels)
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                picture = Image.fromarray(image.permute(1, 2, 0).numpy())
                save_png(picture, out / image_file_name(i, int(label)), durable=False)


def save_png(image: Image.Image, out: Path, durable: bool = True) -> None:
    """Write a PNG; see `atomic_write`."""
    with atomic_write(out, durable) as partial:
        image.save(partial, format="PNG")


def save_pairs(originals: Tensor, reconstructions: Tensor, out: Path) -> None:
    """Save a PNG of originals above their reconstructions; both uint8 [n, 3, S, S].

    Raises:
        UserError: see `check_target`; no space, or no permission.
    """
    check_target(out, (".png",))
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    save_png(pairs(originals, reconstructions, min(10, len(originals))), out)


def save_curves(rows: list[dict], path: Path) -> None:
    """Plot losses, gradient norm and learning rate against the step, from the rows of metrics.jsonl."""
    from matplotlib.figure import Figure  # slow to import, and needed once per run

    def column(key: str) -> np.ndarray:
        # A row of another version, or one that was changed by hand, may lack a value.
        values = (row.get(key) for row in rows)
        return np.array([value if isinstance(value, (int, float)) else np.nan for value in values], dtype=float)

    panels = [("l1", "L1"), ("flow", "flow loss (sum of F)"), ("grad_norm", "gradient norm"), ("lr", "learning rate")]
    for key, title in (("lpips", "LPIPS"), ("cross_entropy", "cross-entropy of elements")):
        if np.nan_to_num(column(key)).any():
            panels.insert(1, (key, title))
    figure = Figure(figsize=(3.2 * len(panels), 2.8), layout="constrained")
    steps = column("step")
    for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.plot(steps, column(key), linewidth=1)
        axes.set(title=title, xlabel="step", yscale="linear" if key == "lr" else "log")
        axes.grid(alpha=0.3)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=100)
