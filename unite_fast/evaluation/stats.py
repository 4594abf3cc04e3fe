"""Reference statistics of a data folder: `unite-fast stats`."""

from pathlib import Path

import torch

from unite_fast.config import EvaluationSettings
from unite_fast.data_pipeline.inspection import open_data
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import require
from unite_fast.evaluation import pixels
from unite_fast.evaluation.features import Features
from unite_fast.evaluation.inception import load_inception
from unite_fast.evaluation.judge import choose_features, fit_pixels_once
from unite_fast.evaluation.reference import make_reference
from unite_fast.evaluation.statistics import Reference, save_reference
from unite_fast.utils.files import check_target
from unite_fast.utils.progress import Track, no_progress


def save_statistics(
    data: str,
    image_size: int,
    split: str,
    settings: EvaluationSettings,
    out: Path,
    ranks: Ranks,
    device: torch.device | str,
    workers: int = 2,
    track: Track = no_progress,
) -> Reference:
    """Statistics of all images of a data folder, written by rank 0.

    Args:
        data: folder or address of data, or "digits".
        image_size: side to which images are cropped; 0: what suits the data.

    Raises:
        UserError: data or weights that are missing, images too large for pixels, or a file that cannot be written.
    """
    check_target(out, (".npz",))
    kind, source = open_data(data, image_size, split)
    size = source.image_size
    if choose_features(settings, size) == pixels.NAME:
        require(
            size <= pixels.LARGEST,
            f"these images are {size} x {size}; features pixels are for {pixels.LARGEST} x {pixels.LARGEST}: "
            "use --features inception",
        )
        features: Features = fit_pixels_once(source, ranks, device)
    else:
        features = load_inception(settings.inception, settings.inception_sha256, device)
    made = make_reference(source, features, ranks, settings.batch, workers, track)
    made.about |= {"data": data, "source": kind, "split": split}
    if ranks.main:
        save_reference(made, out)
    return made
