"""Generation at scale: any number of images, by any number of processes, that a kill does not lose.

Samples come in fixed batches: batch b is the samples from b * B on, and the last one is padded to B. A batch is
computed alike whoever computes it and whatever was computed before, so the images are the same bit for bit for 1, 2 or
4 processes and after any resume (on one kind of device, with one number of threads a process).
"""

import hashlib
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from unite_fast.config import SamplingConfig, require, require_choice
from unite_fast.data_pipeline.progress import progress
from unite_fast.errors import UserError
from unite_fast.generated_files import open_parts
from unite_fast.model.unite import UNITE
from unite_fast.sampling import Network, check_classes, generate_batch
from unite_fast.trained import TrainedUNITE, check_drawing


@dataclass(frozen=True)
class Generation:
    """What is generated. Sample i has label labels[i] and noise drawn from (seed, i)."""

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

    def __post_init__(self):
        require(len(self.labels) > 0, "there is nothing to generate: the number of images is 0")
        check_drawing(self.seed, self.batch)
        require_choice("the precision", self.precision, ("float32", "bfloat16"))

    @property
    def batches(self) -> int:
        return -(-len(self.labels) // self.batch)

    def manifest(self, model: UNITE) -> dict:
        """All that the images depend on, as JSON has it."""
        labels = hashlib.sha256(self.labels.numpy().tobytes()).hexdigest()
        return {
            "format": "unite_fast generation 1",
            "weights": weights_digest(model),
            "images": len(self.labels),
            "labels": labels,
            "seed": self.seed,
            "batch": self.batch,
            "precision": self.precision,
            "compile": self.compile,
            **{f"sampling.{key}": value for key, value in asdict(self.sampling).items()},
        }


class Drawn(NamedTuple):
    """Some finished samples."""

    indices: Tensor
    """int64 [n]: which ones, in order."""
    images: Tensor
    """uint8 [n, 3, S, S], on the CPU."""
    labels: Tensor
    """int64 [n]."""


def generate_batches(
    model: UNITE, generation: Generation, rank: int = 0, world: int = 1, done: Collection[int] = ()
) -> Iterator[Drawn]:
    """This process's share of the batches that are not `done`, dealt round robin.

    Every one of the `world` processes gets the same number of items, so that it may join the others in a collective for
    each; in the last round some can be empty (n = 0).

    Raises:
        UserError: a label that is no class of the model.
    """
    check_classes(generation.labels.unique().tolist(), model.config.num_classes)
    left = [number for number in range(generation.batches) if number not in done]
    network = Network.of(model, generation.sampling.order)
    if generation.compile:
        network = network.compiled()
    return (
        _draw(model, network, generation, left[first + rank]) if first + rank < len(left) else _nothing(model)
        for first in range(0, len(left), world)
    )


def _draw(model: UNITE, network: Network, generation: Generation, number: int) -> Drawn:
    positions = torch.arange(number * generation.batch, (number + 1) * generation.batch)
    # The padding is more samples of the last class: static shapes for the compiler, and for dopri5, whose steps depend
    # on the whole batch, something that no process or resume changes.
    labels = generation.labels[positions.clamp_max(len(generation.labels) - 1)]
    images = generate_batch(
        model, network, labels, positions, generation.sampling, generation.seed, generation.precision
    )
    real = min(len(generation.labels) - number * generation.batch, generation.batch)
    return Drawn(positions[:real], images[:real], labels[:real])


def _nothing(model: UNITE) -> Drawn:
    none, size = torch.empty(0, dtype=torch.int64), model.config.image_size
    return Drawn(none, torch.empty(0, 3, size, size, dtype=torch.uint8), none)


def generate_files(model: TrainedUNITE, generation: Generation, out: Path, rank: int = 0, world: int = 1) -> None:
    """Generate into an .npz (arr_0 uint8 [num, S, S, 3], arr_1 labels) or a folder of PNGs, all processes together.
    What an earlier call with the same settings had finished when it was killed is kept.

    Raises:
        UserError: `out` is there already, or parts of it with other settings; a label that is no class; no space left.
    """
    network = model.network
    check_classes(generation.labels.unique().tolist(), network.config.num_classes)
    parts = open_parts(
        out, generation.manifest(network), generation.labels, generation.batch, network.config.image_size
    )

    def prepare() -> set[int]:
        parts.open()
        return parts.finished()

    done = _agreed(prepare, rank, world)
    shown = min(len(done) * generation.batch, len(generation.labels))
    with progress("generating", len(generation.labels), "images") as show:
        for drawn in generate_batches(network, generation, rank, world, done):
            if rank == 0:
                show(shown)
            if len(drawn.indices):
                parts.write(int(drawn.indices[0]) // generation.batch, drawn.images)
            shown = min(shown + world * generation.batch, len(generation.labels))
    _agreed(parts.merge if rank == 0 else None, rank, world)


def _agreed(function, rank: int, world: int):
    """Run on rank 0 once all have come here; every process gets its result, or its `UserError`."""
    if world > 1:
        try:
            dist.barrier()
        except RuntimeError as error:
            raise UserError("another process of this generation ended early; its own message says why") from error
    outcome = [None]
    if rank == 0:
        try:
            outcome = [function()]
        except UserError as error:
            outcome = [error]
    if world > 1:
        dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


@contextmanager
def joined_processes() -> Iterator[tuple[int, int]]:
    """Rank and number of the processes, as torchrun says them; one process alone is rank 0 of 1."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if world == 1:
        yield 0, 1
        return
    # They meet twice, with hours of work between; a process that dies is torchrun's to notice.
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield dist.get_rank(), world
    finally:
        dist.destroy_process_group()


def weights_digest(model: UNITE) -> str:
    """SHA-256 of all weights and buffers that are saved, by name, in hexadecimal: the same for every file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
