"""The pictures that a run draws: samples, and held-out data with their reconstructions.

`make` runs the model and is called by all ranks together; `drawings` is for rank 0.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unite_fast.config import MOLECULES, Config
from unite_fast.data_pipeline import Source, open_held_out, open_source, read_readable
from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.data_pipeline.molecules.of_config import molecules_of
from unite_fast.data_pipeline.splits import HELD_OUT as HELD_OUT_SPLIT
from unite_fast.data_pipeline.splits import ClassesDiffer
from unite_fast.errors import UserError
from unite_fast.evaluation.batches import HELD_OUT, TRAINING
from unite_fast.model.unite import UNITE
from unite_fast.sampling import sampler
from unite_fast.sampling.molecules import draw_sizes, reconstruct, unpack
from unite_fast.utils.images import grid, pairs

PICTURE_ROWS = 8
PICTURE_COLUMNS = 10
MOLECULE_ROWS, MOLECULE_COLUMNS = 4, 8

Drawings = dict[str, Callable[[], Image.Image]]


class ImagePictures:
    """
    Attributes:
        real: images uint8 [n, 3, S, S] to reconstruct.
        of_real: what they are.
    """

    def __init__(self, config: Config):
        self.config = config
        self.real, self.of_real = real_images(config)

    def make(self, model: UNITE) -> tuple[Tensor, Tensor]:
        """Samples and reconstructions, uint8 [n, 3, S, S]."""
        config = self.config
        labels = torch.arange(PICTURE_ROWS * PICTURE_COLUMNS) % min(config.model.num_classes, PICTURE_COLUMNS)
        samples = sampler.sample_images(
            model, labels, config.sampling, config.seed, precision=config.train.network_precision
        )
        return samples, sampler.reconstruct(model, self.real, config.seed)

    def drawings(self, samples: Tensor, reconstructions: Tensor) -> Drawings:
        return {
            "samples": partial(grid, samples, PICTURE_COLUMNS),
            "reconstructions": partial(pairs, self.real, reconstructions, PICTURE_COLUMNS),
        }


class MoleculePictures:
    """
    Attributes:
        real: molecules to reconstruct.
        of_real: what they are.
    """

    def __init__(self, config: Config):
        self.config = config
        try:
            source, self.of_real = molecules_of(config, HELD_OUT_SPLIT), HELD_OUT
        except UserError as error:
            source, self.of_real = molecules_of(config, "train"), f"training molecules: {error}"
        # Evenly spaced: sets such as QM9 begin with the smallest.
        count = min(len(source), MOLECULE_ROWS * MOLECULE_COLUMNS // 2)
        self.real = source.molecules.take(np.linspace(0, len(source) - 1, count).astype(int))

    def make(self, model: UNITE) -> tuple[MoleculeSet, MoleculeSet]:
        """Samples and reconstructions."""
        config = self.config
        sizes = draw_sizes(model.size_counts, MOLECULE_ROWS * MOLECULE_COLUMNS, config.seed)
        samples = sampler.sample_images(
            model, sizes, config.sampling, config.seed, precision=config.train.network_precision
        )
        return unpack(samples, sizes, config.model.symbols), reconstruct(model, self.real, config.seed)

    def drawings(self, samples: MoleculeSet, reconstructions: MoleculeSet) -> Drawings:
        from unite_fast.evaluation.molecules.pictures import molecule_grid, molecule_pairs

        return {
            "samples": partial(molecule_grid, samples, MOLECULE_COLUMNS),
            "reconstructions": partial(molecule_pairs, self.real, reconstructions, MOLECULE_COLUMNS),
        }


def open_pictures(config: Config) -> ImagePictures | MoleculePictures:
    """
    Raises:
        ClassesDiffer: see `real_images`.
    """
    return (MoleculePictures if config.model.modality == MOLECULES else ImagePictures)(config)


def real_images(config: Config) -> tuple[torch.Tensor, str]:
    """The first readable held-out images, or training images if none are held out.

    Returns:
        Images uint8 [n, 3, S, S], and what they are: `HELD_OUT`, or training images and why.

    Raises:
        ClassesDiffer: the held-out images have other classes than the training images.
    """
    data = (config.data.source, config.data.path, config.model.image_size)
    try:
        source, held_out = open_held_out(*data, config.model.num_classes)
        kind = HELD_OUT if held_out else f"{TRAINING}: the data have no held-out split"
        return _first_images(source), kind
    except ClassesDiffer:
        raise
    except UserError as error:
        source = open_source(*data, "train", config.model.num_classes)
        return _first_images(source), f"{TRAINING}: {error}"


def _first_images(source: Source) -> torch.Tensor:
    return read_readable(source, range(len(source)), most=PICTURE_ROWS * PICTURE_COLUMNS // 2)[0]
