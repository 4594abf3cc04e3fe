"""What the commands read and write: labels, pictures, descriptions."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unite_fast.config import check_seed_and_batch
from unite_fast.data_pipeline import UnreadableSample, read_image
from unite_fast.errors import UserError
from unite_fast.sampling import check_classes
from unite_fast.trained import TrainedUNITE
from unite_fast.training.model_file import empty_network, load_model
from unite_fast.utils.progress import track


def choose_labels(classes: Sequence[int], count: int, num_classes: int) -> Tensor:
    """`count` labels that go through the given classes (none: all) in turn: int64 [count]."""
    wanted = classes or range(num_classes)
    check_classes(wanted, num_classes)  # before the tensor, which holds no number of 20 digits
    return torch.tensor([wanted[i % len(wanted)] for i in range(count)])


def generate_with_progress(model: TrainedUNITE, labels: Tensor, seed: int, batch: int, settings: dict) -> Tensor:
    """As `TrainedUNITE.generate`, a bar showing how far it is."""
    check_seed_and_batch(seed, batch)
    starts = range(0, len(labels), batch)
    parts = [
        model.generate(labels[start : start + batch], seed, batch, first=start, **settings)
        for start in track(starts, len(starts), "generating")
    ]
    return torch.cat(parts)


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
