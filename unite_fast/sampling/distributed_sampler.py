"""Generation at scale: any number of images, by any number of processes, always the same ones.

Samples come in fixed batches: batch b is the samples from b * B on, and the last one is padded to B. A batch is
computed alike whoever computes it and whatever was computed before, so the images are the same bit for bit for 1, 2 or
4 processes and after any resume (on one kind of device, with one number of threads a process).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unite_fast.config import SamplingConfig, check_seed_and_batch
from unite_fast.distributed.process_group import ALONE, Ranks
from unite_fast.errors import require, require_choice
from unite_fast.model.unite import UNITE
from unite_fast.sampling.sampler import Network, check_classes, generate_batch


@dataclass(frozen=True)
class Generation:
    """What is generated. Sample i has label labels[i] and noise drawn from (seed, first + i)."""

    labels: Tensor
    """int64 [num]."""
    sampling: SamplingConfig
    seed: int = 0
    batch: int = 64
    """Images at a time, B. Another B may round otherwise, and dopri5 choose other steps."""
    precision: str = "float32"
    """Of the network: float32, or bfloat16 (autocast)."""
    compile: bool = False
    """Compile the network, for two shapes: worth it for many images on a GPU, minutes on a CPU."""
    first: int = 0
    """Number of sample 0 among all that the seed can draw."""

    def __post_init__(self):
        require(len(self.labels) > 0, "there is nothing to generate: the number of images is 0")
        check_seed_and_batch(self.seed, self.batch)
        require_choice("the precision", self.precision, ("float32", "bfloat16"))

    @property
    def batches(self) -> int:
        return -(-len(self.labels) // self.batch)


class Drawn(NamedTuple):
    """Some finished samples."""

    indices: Tensor
    """int64 [n]: which ones, in order."""
    images: Tensor
    """uint8 [n, 3, S, S], on the CPU."""
    labels: Tensor
    """int64 [n]."""
    evaluations: int
    """Network evaluations that each image took."""


def generate_batches(
    model: UNITE,
    generation: Generation,
    ranks: Ranks = ALONE,
    done: Collection[int] = (),
    network: Network | None = None,
) -> Iterator[Drawn]:
    """This process's share of the batches that are not `done`, dealt round robin.

    Every process gets the same number of items, so that it may join the others in a collective for each; in the last
    round some can be empty (n = 0).

    Args:
        network: the model's, if it is there already: more generations than one can share what was compiled.

    Raises:
        UserError: a label that is no class of the model.
    """
    check_classes(generation.labels.unique().tolist(), model.config.num_classes)
    left = [number for number in range(generation.batches) if number not in done]
    network = network or Network.of(model, generation.sampling.order, generation.compile)
    return (
        _draw(model, network, generation, left[at]) if at < len(left) else _nothing(model)
        for at in range(ranks.rank, -(-len(left) // ranks.world) * ranks.world, ranks.world)
    )


def _draw(model: UNITE, network: Network, generation: Generation, number: int) -> Drawn:
    positions = torch.arange(number * generation.batch, (number + 1) * generation.batch)
    # The padding is more samples of the last class: static shapes for the compiler, and for dopri5, whose steps depend
    # on the whole batch, something that no process or resume changes.
    labels = generation.labels[positions.clamp_max(len(generation.labels) - 1)]
    images, evaluations = generate_batch(
        model,
        network,
        labels,
        generation.first + positions,
        generation.sampling,
        generation.seed,
        generation.precision,
    )
    real = min(len(generation.labels) - number * generation.batch, generation.batch)
    return Drawn(positions[:real], images[:real], labels[:real], evaluations)


def _nothing(model: UNITE) -> Drawn:
    none, size = torch.empty(0, dtype=torch.int64), model.config.image_size
    return Drawn(none, torch.empty(0, 3, size, size, dtype=torch.uint8), none, 0)
