"""Forward passes over a batch of molecules of several sizes (`molecules.batching`).

    groups      one pass for each size in the batch: no pads, shapes that differ from pass to pass
    padded      all molecules padded to T atoms: the same shapes in every step

Random numbers belong to an atom of a molecule, losses are means over the atoms of the whole step, and no pad reaches
them, so both give the same losses and gradients up to rounding (tests/training/test_molecule_batches.py).

b molecules of this rank, T atoms of a padded molecule, n atoms of the molecules of one pass.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed

from unite_fast.config import Config
from unite_fast.distributed.process_group import current_ranks
from unite_fast.model.layers import real_tokens
from unite_fast.objective import MicroBatch, draw_step
from unite_fast.randomness import Philox, Stream


@dataclass(frozen=True)
class Pass:
    """The molecules of one forward pass."""

    rows: Tensor | slice
    """int64 on the CPU, or a slice: its start needs no copy to the device, which a CUDA graph could not contain."""
    atoms: int
    """Length of their padded atoms."""
    counts: bool = True
    """Whether their losses count. If not, the pass only keeps this rank in step with the others."""


class MoleculeBatches:
    """
    Attributes:
        padded: see above.
    """

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        batching = config.molecules.batching
        auto = device.type == "cuda" or config.train.compile
        self.padded = auto if batching == "auto" else batching == "padded"

    def mean_atoms(self, sizes: Tensor) -> Tensor:
        """Atoms of the whole batch divided by the number of ranks, float32 scalar on the device. All ranks call this
        together.

        Args:
            sizes: atoms of this rank's molecules, int64 [b].
        """
        ranks = current_ranks()
        return ranks.sum(sizes.sum().to(self.device, torch.float32)) / ranks.world

    def passes(self, sizes: Tensor, most: int) -> list[Pass]:
        """Split a batch into passes of at most `most` molecules; the same number on all ranks, which call this
        together.

        Args:
            sizes: int64 [b]; on the CPU unless padded.
        """
        if self.padded:
            starts = range(0, len(sizes), most)
            return [Pass(slice(start, start + most), self.config.model.latent_tokens) for start in starts]
        passes = [
            Pass(rows, size)
            for size in sizes.unique().tolist()
            for rows in (sizes == size).nonzero().flatten().split(most)
        ]
        if current_ranks().world > 1:
            # A sharded model needs all ranks in each pass.
            number = torch.tensor(len(passes), device=self.device)
            distributed.all_reduce(number, distributed.ReduceOp.MAX)
            passes += [replace(passes[-1], counts=False)] * (int(number) - len(passes))
        return passes

    def make(self, one: Pass, atoms: Tensor, sizes: Tensor, positions: Tensor, mean_atoms: Tensor) -> MicroBatch:
        """The input of a pass.

        Args:
            atoms: of the whole batch, float32 [b, T, 4].
            sizes: int64 [b].
            positions: of the molecules in this step, int64 [b], on the device.
        """
        molecules, config = self.config.molecules, self.config
        atoms = atoms[one.rows, : one.atoms].to(self.device, non_blocking=True)
        sizes = sizes[one.rows].to(self.device, non_blocking=True)
        if self.padded:
            atoms = torch.where(real_tokens(sizes, one.atoms)[..., None], atoms, 0.0)
        philox = Philox(config.seed, 0, positions[one.rows])
        if molecules.permute:
            atoms = permute(atoms, sizes, philox)
        if molecules.rotate == "random":
            atoms = torch.cat((atoms[..., :1], atoms[..., 1:] @ rotations(philox)), dim=-1)
        return MicroBatch(
            atoms,
            sizes,
            draw_step(config.objective, philox, (one.atoms, config.model.latent_channels)),
            lengths=sizes if self.padded else None,
            divisor=mean_atoms / sizes.sum() if one.counts else mean_atoms.new_tensor(math.inf),
        )


def permute(atoms: Tensor, sizes: Tensor, philox: Philox) -> Tensor:
    """Atoms float32 [b, n, 4] of each molecule in random order; pads stay at the end."""
    keys = philox.words(Stream.ATOM_ORDER, (atoms.shape[1],))
    order = torch.where(real_tokens(sizes, atoms.shape[1]), keys, 2**32).argsort(dim=1, stable=True)
    return atoms.gather(1, order[..., None].expand_as(atoms))


def rotations(philox: Philox) -> Tensor:
    """Uniformly random rotations, float32 [b, 3, 3]: of a unit quaternion of four normals (Shoemake, "Uniform random
    rotations", Graphics Gems III, 1992). No reflections: they make another molecule."""
    quaternion = philox.normal(Stream.ROTATION, (4,))
    w, x, y, z = (quaternion / quaternion.norm(dim=1, keepdim=True)).unbind(1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
