"""A trained model of molecules ready to generate, encode and decode them.

m molecules, T = model.latent_tokens atoms with pads, C latent channels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unite_fast.config import SamplingConfig, check_count, check_seed_and_batch
from unite_fast.data_pipeline.molecules.elements import NUMBERS
from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.data_pipeline.molecules.source import MoleculeSource
from unite_fast.errors import UserError, require, shown
from unite_fast.model.layers import real_tokens
from unite_fast.model.unite import UNITE
from unite_fast.randomness import Philox, Stream
from unite_fast.sampling import sampler
from unite_fast.sampling.pipeline import TrainedModel


class TrainedMolecules(TrainedModel):
    """A model trained on molecules, with the settings of its training."""

    @property
    def symbols(self) -> list[str]:
        """The elements that it knows."""
        return self.config.model.symbols

    def sampling_config(self, **settings) -> SamplingConfig:
        """See `TrainedModel.sampling_config`.

        Raises:
            UserError: see there; or guidance.
        """
        config = super().sampling_config(**settings)
        require(
            config.guidance == 1,
            f"guidance is {config.guidance:g}; it must be 1 for molecules: their class is their number of atoms, which "
            "is always given, so there is nothing to guide",
        )
        return config

    def draw_sizes(self, count: int, seed: int = 0, first: int = 0) -> Tensor:
        """Numbers of atoms, int64 [count], distributed as in the training molecules; that of molecule i is drawn from
        (seed, first + i).

        Raises:
            UserError: `count` out of range, or a model that saw no molecules.
        """
        check_count("the number of molecules", count)
        return draw_sizes(self.network.size_counts, count, seed, first)

    def generate(
        self, sizes: Sequence[int] | Tensor, seed: int = 0, batch: int = 64, first: int = 0, **settings
    ) -> MoleculeSet:
        """Generate one molecule per size.

        Args:
            sizes: numbers of atoms, [m]; `draw_sizes` has those of the training molecules.
            seed: the noise of molecule i is drawn from (seed, first + i).
            batch: molecules per forward pass.
            first: offset of the first molecule, to generate a long series in parts.
            settings: fields of `SamplingConfig`.

        Raises:
            UserError: size or setting out of range.
        """
        config = self.sampling_config(**settings)
        sizes = torch.as_tensor(sizes, dtype=torch.int64)
        require(sizes.dim() == 1 and len(sizes) > 0, "sizes must be a list of numbers of atoms")
        self.check_sizes(sizes)
        check_seed_and_batch(seed, batch)
        atoms = sampler.sample_images(self.network, sizes, config, seed, batch, first)
        return unpack(atoms, sizes, self.symbols)

    def check_sizes(self, sizes: Sequence[int] | Tensor) -> None:
        """
        Raises:
            UserError: a number of atoms that the model does not know.
        """
        most = self.config.model.num_classes - 1
        numbers = sizes.tolist() if isinstance(sizes, Tensor) else sizes
        outside = [size for size in numbers if not 1 <= size <= most]
        require(not outside, f"{shown(outside[:1])} atoms: this model makes molecules of 1 to {most} atoms")

    def encode(self, molecules: MoleculeSet, seed: int = 0, batch: int = 64, first: int = 0) -> Tensor:
        """See `encode`."""
        return encode(self.network, molecules, seed, batch, first)

    def decode(self, latents: Tensor | np.ndarray, sizes: Sequence[int] | Tensor, batch: int = 64) -> MoleculeSet:
        """Latents [m, T, C] of molecules with these numbers of atoms, [m] -> molecules.

        Raises:
            UserError: latents of another shape, sizes out of range, or values that are not finite.
        """
        latents = torch.as_tensor(latents, dtype=torch.float32, device=self.network.device)
        sizes = torch.as_tensor(sizes, dtype=torch.int64)
        shape = (len(sizes), self.config.model.latent_tokens, self.config.model.latent_channels)
        if latents.shape != shape:
            raise UserError(f"latents must be {list(shape)}, got {list(latents.shape)}")
        require(len(sizes) > 0, "there must be at least one molecule's latents")
        self.check_sizes(sizes)
        check_seed_and_batch(0, batch)
        return decode(self.network, latents, sizes, batch)

    def reconstruct(self, molecules: MoleculeSet, seed: int = 0, batch: int = 64, first: int = 0) -> MoleculeSet:
        """Encode and decode molecules. Raises what `encode` raises."""
        return reconstruct(self.network, molecules, seed, batch, first)

    def interpolate(self, molecules: MoleculeSet, steps: int, seed: int = 0) -> MoleculeSet:
        """Molecules between two of the same number of atoms: decoded from points between their latents, atom by atom.

        Args:
            molecules: two.
            steps: number of molecules, the two reconstructed ones included; at least 2.

        Raises:
            UserError: not two molecules of one size.
        """
        require(len(molecules) == 2 and len(set(molecules.sizes.tolist())) == 1, "give two molecules of one size")
        require(steps >= 2, "steps must be at least 2")
        start, end = self.encode(molecules, seed)
        weights = torch.linspace(0, 1, steps, device=start.device)[:, None, None]
        return self.decode(slerp(start, end, weights), molecules.sizes[:1].repeat(steps).tolist())


@torch.no_grad()
def encode(model: UNITE, molecules: MoleculeSet, seed: int = 0, batch: int = 64, first: int = 0) -> Tensor:
    """Molecules -> latents float32 [m, T, C] on the model's device; 0 in pads.

    Each atom has one latent of C channels. Registers of molecule i are drawn from (seed, first + i); the tokenizer runs
    at t = 0.

    Raises:
        UserError: no molecules, an element that the model does not know, or too many atoms.
    """
    check_seed_and_batch(seed, batch)
    config, device, out = model.config, model.device, []
    atoms, sizes = MoleculeSource(molecules, config.symbols, config.latent_tokens).read(range(len(molecules)))
    for start in range(0, len(atoms), batch):
        part, lengths = (x[start : start + batch].to(device) for x in (atoms, sizes))
        positions = torch.arange(first + start, first + start + len(part), device=device)
        registers = Philox(seed, 0, positions).normal(Stream.REGISTERS, (config.latent_tokens, config.latent_channels))
        latents = model.tokenize(part, registers, torch.zeros(len(part), device=device), lengths)
        real = real_tokens(lengths, config.latent_tokens)
        out.append(torch.where(real[..., None], latents, 0.0))
    return torch.cat(out)


@torch.no_grad()
def decode(model: UNITE, latents: Tensor, sizes: Tensor, batch: int = 64) -> MoleculeSet:
    """Latents float32 [m, T, C] on the model's device, and numbers of atoms int64 [m] -> molecules.

    Raises:
        NonFinite: positions are not finite.
    """
    parts = zip(latents.split(batch), sizes.to(latents.device).split(batch), strict=True)
    atoms = torch.cat([sampler.decode_molecules(model, *part) for part in parts])
    return unpack(sampler.finished_molecules(atoms, "decoded latents"), sizes.cpu(), model.config.symbols)


def reconstruct(model: UNITE, molecules: MoleculeSet, seed: int = 0, batch: int = 64, first: int = 0) -> MoleculeSet:
    """Encode and decode molecules."""
    return decode(model, encode(model, molecules, seed, batch, first), torch.from_numpy(molecules.sizes), batch)


def draw_sizes(counts: Tensor, count: int, seed: int, first: int = 0) -> Tensor:
    """Draw sizes from a histogram: counts float32 [num_classes] -> int64 [count]; see `TrainedMolecules.draw_sizes`."""
    cumulative = counts.double().cpu().cumsum(0)
    require(float(cumulative[-1]) > 0, "this model has no histogram of sizes: it was trained on no molecules")
    uniform = Philox(seed, 0, torch.arange(first, first + count)).uniform(Stream.MOLECULE_SIZE)
    return torch.searchsorted(cumulative, uniform.double() * cumulative[-1], right=True)


def unpack(atoms: Tensor, sizes: Tensor, symbols: Sequence[str]) -> MoleculeSet:
    """Molecules float32 [m, T, 4] as `sampler.decode_molecules` makes them -> a set."""
    numbers = np.array([NUMBERS[symbol] for symbol in symbols], np.uint8)
    array, sizes_array = atoms.numpy(), sizes.numpy()
    real = np.arange(array.shape[1]) < sizes_array[:, None]
    elements = np.where(real, numbers[array[..., 0].astype(np.int64)], 0)
    return MoleculeSet.of(elements, array[..., 1:], sizes_array)


def slerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """Spherical interpolation along the last dimension: latents [N, C], weights [k, 1, 1] -> [k, N, C]. All latents
    have about the same norm, and so have the results."""
    norms = start.norm(dim=-1, keepdim=True) * end.norm(dim=-1, keepdim=True)
    cosine = (start * end).sum(-1, keepdim=True) / norms.clamp_min(1e-12)
    angle = cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos()
    return (((1 - weight) * angle).sin() * start + (weight * angle).sin() * end) / angle.sin()
