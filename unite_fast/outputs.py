"""What the commands read and write: labels, pictures, descriptions."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unite_fast.config import require
from unite_fast.data_pipeline import UnreadableSample, read_image
from unite_fast.errors import UserError, writing, writing_aside
from unite_fast.evaluation.terminal import shown
from unite_fast.pictures import grid, pairs, picture_name
from unite_fast.sampling import check_classes
from unite_fast.trained import TrainedUNITE, check_drawing
from unite_fast.training.model_file import empty_network, load_model


def choose_labels(classes: Sequence[int], count: int, num_classes: int) -> Tensor:
    """`count` labels that go through the given classes (none: all) in turn: int64 [count]."""
    wanted = classes or range(num_classes)
    check_classes(wanted, num_classes)  # before the tensor, which holds no number of 20 digits
    return torch.tensor([wanted[i % len(wanted)] for i in range(count)])


def generate_with_progress(model: TrainedUNITE, labels: Tensor, seed: int, batch: int, settings: dict) -> Tensor:
    """As `TrainedUNITE.generate`, a bar showing how far it is."""
    check_drawing(seed, batch)
    starts = range(0, len(labels), batch)
    parts = [
        model.generate(labels[start : start + batch], seed, batch, first=start, **settings)
        for start in shown(starts, len(starts), "generating")
    ]
    return torch.cat(parts)


def check_target(out: Path, endings: tuple[str, ...] = (".png", ".npz", "")) -> None:
    """Refuse a name that cannot be written, before the work is done; no ending means a folder.

    Raises:
        UserError: another ending, or something of another kind in its place.
    """
    known = ", ".join(ending or "a folder (a name without an ending)" for ending in endings)
    require(out.suffix in endings, f"{out} ends in {out.suffix or 'nothing'}; what is written here is: {known}")
    require(not out.exists() or out.is_dir() == (not out.suffix), f"{out} is in the way; choose another --out")


def save_images(images: Tensor, labels: Tensor, out: Path, columns: int) -> None:
    """uint8 [n, 3, S, S] as one PNG grid, an .npz (arr_0 uint8 [n, S, S, 3], arr_1 labels) or a folder of PNGs.

    Raises:
        UserError: see `check_target`; or no space left, or no permission.
    """
    check_target(out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".png":
            grid(images, columns).save(out)
        elif out.suffix == ".npz":
            np.savez(out, images.permute(0, 2, 3, 1).numpy(), labels.numpy())
        else:
            out.mkdir(exist_ok=True)
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(out / picture_name(i, int(label)))


def save_pairs(originals: Tensor, copies: Tensor, out: Path) -> None:
    """Originals, each above its copy, as one PNG.

    Raises:
        UserError: see `check_target`; or no space left, or no permission.
    """
    check_target(out, (".png",))
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        pairs(originals, copies, min(10, len(originals))).save(out)


def save_text(text: str, out: Path) -> None:
    """A text file in UTF-8, written aside and renamed.

    Raises:
        UserError: no space left, or no permission.
    """
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with writing_aside(out) as partial:
        partial.write_text(text, encoding="utf-8")


def read_images(paths: list[Path], size: int) -> Tensor:
    """Picture files, centre-cropped: uint8 [n, 3, size, size]."""
    try:
        images = [read_image(path, size) for path in paths]
    except UnreadableSample as error:
        raise UserError(f"cannot read {error.name}: {error.reason}") from error
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def describe(checkpoint: Path) -> str:
    """Step, parameters and settings of a checkpoint or model file, for a person to read."""
    import yaml

    from unite_fast.recipes import to_tree

    saved = load_model(checkpoint)
    counts = Counter()
    for name, parameter in empty_network(saved.config).named_parameters():
        counts[name.split(".")[0]] += parameter.numel()
    path = saved.path.resolve()
    files = path.iterdir() if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files) / 2**20
    lines = [
        f"{path.name}: {saved.config.name}, {saved.step} optimizer steps, {size:.1f} MiB",
        f"parameters: {sum(counts.values()):,} (encoder {counts['encoder']:,}, decoder {counts['decoder']:,})",
        yaml.safe_dump(to_tree(saved.config), sort_keys=False).rstrip(),
    ]
    return "\n".join(lines)
