"""Embedding and decoder of molecules (docs/molecules.md). All else is the Generative Encoder of images.

The paper leaves open how atoms enter and leave the model; this is our choice. There is one latent token per atom, and
the atom is added to its token. In a first version, atoms were tokens of their own, like the patches of an image: after
the same 120 steps, the elements of 1 % of the molecules were right, against 100 % (docs/LOG.md).

Shapes: B batch, N atoms, C latent channels, D width, E elements.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unite_fast.config import ModelConfig
from unite_fast.kernels import tensors
from unite_fast.kernels.tensors import upcast
from unite_fast.model.decoder import LAYER_NORM_EPS, DecoderLayer, initialize_by_default
from unite_fast.model.generative_encoder import GenerativeEncoder
from unite_fast.model.layers import Linear, fill, key_mask, real_tokens

TABLE_STD = 0.02


class Atoms(NamedTuple):
    """Decoded atoms, float32."""

    logits: Tensor
    """Of the elements, [B, N, E]."""
    positions: Tensor
    """Angstrom, [B, N, 3]; the mean of a molecule's atoms is 0. Those of pads mean nothing."""


class AtomEmbedding(nn.Module):
    """A row per element plus an MLP of the position."""

    def __init__(self, elements: int, width: int, coordinate_scale: float):
        super().__init__()
        self.scale = coordinate_scale
        self.element = nn.Embedding(elements, width)
        self.fc1 = nn.Linear(3, width)
        self.fc2 = nn.Linear(width, width)
        self.none = nn.Parameter(torch.empty(width))

    def forward(self, atoms: Tensor) -> Tensor:
        """Numbers of elements, and positions in Angstrom: float32 [B, N, 4] -> float32 [B, N, D]."""
        # In float32: bfloat16 rounds a coordinate of 5 Angstrom by up to 0.02.
        with torch.autocast(atoms.device.type, enabled=False):
            positions = self.fc2(F.silu(self.fc1(atoms[..., 1:] / self.scale)))
        return self.element(atoms[..., 0].long()) + positions


class MoleculeEncoder(GenerativeEncoder):
    """The Generative Encoder of molecules.

    Token i is Linear(latent i) + row i of a table + the embedding of atom i, or a learned vector when there are only
    latents. There is no rotation: the order of atoms says little about where they are.
    """

    def add_embedding(self, config: ModelConfig) -> None:
        width = config.encoder.width
        self.latent_tokens = nn.Parameter(torch.empty(1, config.latent_tokens, width)) if config.atom_order else None
        self.atom_embed = AtomEmbedding(len(config.symbols), width, config.coordinate_scale)

    def embed(self, x: Tensor, atoms: Tensor | None) -> Tensor:
        """Latents [B, N, C] and atoms float32 [B, N, 4], or None -> [B, N, D]."""
        x = add_table(self.input_proj(x), self.latent_tokens)
        return x + (self.atom_embed.none if atoms is None else self.atom_embed(atoms))

    def rope(self) -> tuple[Tensor, Tensor]:
        shape = self.positions, self.head_dim // 2
        return torch.ones(shape), torch.zeros(shape)

    def initialize_embedding(self, generator: torch.Generator) -> None:
        atom = self.atom_embed
        tables = [self.latent_tokens, atom.element.weight, atom.none]
        for table in tables if self.latent_tokens is not None else tables[1:]:
            fill(table, nn.init.normal_, std=TABLE_STD, generator=generator)
        for layer in (atom.fc1, atom.fc2):
            fill(layer.weight, nn.init.xavier_uniform_, generator=generator)
            fill(layer.bias, nn.init.zeros_)


class MoleculeDecoder(nn.Module):
    """Linears, a table of learned positions, transformer layers, and a Linear from each token to its atom."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = config.decoder
        self.elements, self.scale = len(config.symbols), config.coordinate_scale
        self.input_proj = Linear(config.latent_channels, size.embed_width)
        self.embed = Linear(size.embed_width, size.width)
        self.atom_table = nn.Parameter(torch.empty(1, config.latent_tokens, size.width)) if config.atom_order else None
        self.layers = nn.ModuleList(DecoderLayer(size.width, size.heads, size.mlp_width) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=LAYER_NORM_EPS)
        self.pred = nn.Linear(size.width, self.elements + 3)

    def forward(self, z: Tensor, lengths: Tensor | None = None) -> Atoms:
        """
        Args:
            z: latents [B, N, C].
            lengths: atoms of each molecule, int64 [B]; the other tokens are pads. None: no pads.
        """
        x, mask = add_table(self.embed(self.input_proj(z)), self.atom_table), key_mask(lengths, z.shape[1])
        branch = branch_bias = None
        for layer in self.layers:
            x, branch, branch_bias = layer(x, branch, branch_bias, mask)
        # From here on in float32: bfloat16 rounds a coordinate of 5 Angstrom by up to 0.02.
        with torch.autocast(z.device.type, enabled=False):
            x = upcast(x)
            if branch is not None:
                x = x + tensors.containing(upcast(branch), branch_bias)
            logits, positions = self.pred(self.norm(x)).split((self.elements, 3), dim=-1)
            return Atoms(logits, self.scale * centred(positions, lengths))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Initialise Linears and norms as the decoder of images; see `GenerativeEncoder.initialize`."""
        initialize_by_default(self, generator)
        if self.atom_table is not None:
            fill(self.atom_table, nn.init.normal_, std=TABLE_STD, generator=generator)


def add_table(x: Tensor, table: Tensor | None) -> Tensor:
    """x [B, N, D] plus the first N rows of a table [1, T, D]."""
    return x if table is None else x + table[:, : x.shape[1]]


def centred(positions: Tensor, lengths: Tensor | None) -> Tensor:
    """Positions [B, N, 3] minus their mean over each molecule's atoms."""
    if lengths is None:
        return positions - positions.mean(dim=1, keepdim=True)
    atoms = torch.where(real_tokens(lengths, positions.shape[1])[..., None], positions, 0.0)
    return atoms - atoms.sum(dim=1, keepdim=True) / lengths[:, None, None]
