"""Sampling on any number of ranks; the images do not depend on that number.

Batches are fixed: batch b holds samples b * B to (b + 1) * B - 1, and the last batch is padded to B. A batch depends
neither on the rank that computes it nor on earlier batches, so the images are equal bit for bit on 1, 2 or 4 ranks and
after any resume (on one kind of device, with the same number of threads per process).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unite_fast.config import MOLECULES, PRECISIONS, SamplingConfig, check_seed_and_batch
from unite_fast.distributed.process_group import ALONE, Ranks
from unite_fast.errors import require, require_choice
from unite_fast.model.unite import UNITE
from unite_fast.sampling.sampler import Network, check_classes, sample_batch


@dataclass(frozen=True)
class Generation:
    """A series of samples. Sample i has label labels[i] and noise drawn from (seed, first + i)."""

    labels: Tensor
    """int64 [num]."""
    sampling: SamplingConfig
    seed: int = 0
    batch: int = 64
    """Batch size B. Another B may change the last bits, and the steps that dopri5 chooses."""
    precision: str = "float32"
    """Precision of the network: float32, or bfloat16 (autocast)."""
    compile: bool = False
    """Compile the network, for two shapes. Pays off for many images on a GPU; takes minutes on a CPU."""
    first: int = 0
    """Offset of sample 0 in the random stream of the seed."""

    def __post_init__(self):
        require(len(self.labels) > 0, "there is nothing to generate: the number of images is 0")
        check_seed_and_batch(self.seed, self.batch)
        require_choice("the precision", self.precision, PRECISIONS)

    @property
    def batches(self) -> int:
        return -(-len(self.labels) // self.batch)


class Samples(NamedTuple):
    """Finished samples of a `Generation`."""

    indices: Tensor
    """int64 [n], ascending positions in the series."""
    images: Tensor
    """uint8 [n, 3, S, S], or molecules float32 [n, T, 4] (`sampler.decode_molecules`), on the CPU."""
    labels: Tensor
    """int64 [n]."""
    evaluations: int
    """Network evaluations per image."""


def sample_distributed(
    model: UNITE,
    generation: Generation,
    ranks: Ranks = ALONE,
    done: Collection[int] = (),
    network: Network | None = None,
) -> Iterator[Samples]:
    """Sample this rank's batches: those that are not `done`, dealt to the ranks round robin.

    Every rank yields the same number of items, so callers may run a collective per item; in the last round some are
    empty (n = 0).

    Args:
        network: a `Network` of this model to reuse, so that several generations share one compilation.

    Raises:
        UserError: label out of range.
    """
    check_classes(generation.labels.unique().tolist(), model.config.num_classes)
    left = [number for number in range(generation.batches) if number not in done]
    network = network or Network.of(model, generation.sampling.order, generation.compile)
    return (
        _sample(model, network, generation, left[i]) if i < len(left) else _no_samples(model)
        for i in range(ranks.rank, -(-len(left) // ranks.world) * ranks.world, ranks.world)
    )


def _sample(model: UNITE, network: Network, generation: Generation, number: int) -> Samples:
    positions = torch.arange(number * generation.batch, (number + 1) * generation.batch)
    # Pad with more samples of the last class: the compiler needs static shapes, and dopri5's steps depend on the whole
    # batch, so the padding must not depend on ranks or resumes.
    labels = generation.labels[positions.clamp_max(len(generation.labels) - 1)]
    n = min(len(generation.labels) - number * generation.batch, generation.batch)
    images, evaluations = sample_batch(
        model,
        network,
        labels,
        generation.first + positions,
        generation.sampling,
        generation.seed,
        generation.precision,
        n,
    )
    return Samples(positions[:n], images, labels[:n], evaluations)


def _no_samples(model: UNITE) -> Samples:
    empty, size = torch.empty(0, dtype=torch.int64), model.config.image_size
    images = torch.empty(0, 3, size, size, dtype=torch.uint8)
    if model.config.modality == MOLECULES:
        images = torch.empty(0, model.config.latent_tokens, 4)
    return Samples(empty, images, empty, 0)
