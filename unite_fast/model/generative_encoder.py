"""The Generative Encoder: one transformer that encodes images and denoises latents. model/molecules.py has that of
molecules, which differs in `embed` alone.

Shapes: B batch, N latent tokens, P patches, L in-context tokens, T tokens of a sequence, C latent channels, D width.
A sequence is [in-context tokens, latent tokens, patch tokens]; the first and last parts may be absent.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unite_fast import kernels
from unite_fast.config import ModelConfig
from unite_fast.kernels.tensors import matmul_dtype
from unite_fast.model.layers import (
    Attention,
    Linear,
    RMSNorm,
    SwiGLU,
    TimeEmbedding,
    fill,
    key_mask,
    rope_table,
    sincos_1d,
)


class Block(nn.Module):
    """One transformer block with adaLN (DiT, Peebles and Xie, arXiv 2212.09748) and a norm of its output:

        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = adaLN(SiLU(c))
        x = x + gate_msa * attn(modulate(norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp * mlp(modulate(norm2(x), shift_mlp, scale_mlp))
        x = norm3(x)

    with modulate(y, shift, scale) = y * (1 + scale) + shift. All norms are RMSNorms.

    `forward` computes this rotated by one line: it starts after norm1 and its modulation, and ends after those of the
    next block. Then all elementwise work between two matmuls is one kernel. The encoder holds norm1 and the adaLN
    Linear of every block, because they are used before the block runs.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width)
        self.norm3 = RMSNorm(width)

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        modulation: tuple[Tensor, ...],
        next_norm: tuple[Tensor, Tensor, Tensor],
        cos: Tensor,
        sin: Tensor,
        token_range: tuple[int, int] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: residual, [B, T, D].
            h: modulate(norm1(x), shift_msa, scale_msa), [B, T, D].
            modulation: gate_msa, shift_mlp, scale_mlp, gate_mlp, each [B, D].
            next_norm: norm weight [D], shift and scale [B, D] of the next block's norm1, or of the final layer.
            cos, sin: rotary table, float32 [T, K / 2].
            token_range: (start, end): compute these tokens alone. All tokens still serve as keys and values.
            mask: keys that are tokens and not pads, bool [B, 1, 1, T]; None: all.

        Returns:
            x and h for the next block.
        """
        gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        attention, attention_bias = self.attn(h, cos, sin, token_range, mask)
        if token_range is not None:
            x = x[:, slice(*token_range)]
        # x = x + gate_msa * attention;  mlp = mlp(modulate(norm2(x), shift_mlp, scale_mlp))
        modulation_mlp = gate_msa, self.norm2.weight, shift_mlp, scale_mlp
        x, mlp, mlp_bias = self.mlp(x, attention, attention_bias, *modulation_mlp)
        # x = norm3(x + gate_mlp * mlp);  h = modulate(next norm1(x), next shift_msa, next scale_msa)
        return kernels.gated_residual_norm_adaln(
            x, mlp, gate_mlp, self.norm3.weight, *next_norm, out_dtype=matmul_dtype(x), branch_bias=mlp_bias
        )


class FinalLayer(nn.Module):
    """linear(modulate(norm(x), shift, scale)), with shift and scale from an adaLN Linear of SiLU(c)."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm = RMSNorm(width)
        self.modulation = Linear(width, 2 * width)
        self.linear = Linear(width, channels)


class GenerativeEncoder(nn.Module):
    """A DiT with in-context label tokens (see `Block` and `forward`).

    `optim/param_groups.py` picks the parameters for AdamW by the names `patch_embed`, `final_layer`,
    `in_context_posemb` and `latent_tokens`.
    """

    rope_cos: Tensor
    rope_sin: Tensor
    """Rotary tables, float32 [L + N + P, K / 2]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = config.encoder
        self.in_context = size.in_context_tokens
        self.in_context_start = size.in_context_start
        self.no_class = config.num_classes
        self.input_proj = Linear(config.latent_channels, size.width)
        self.add_embedding(config)
        self.time_embed = TimeEmbedding(size.width)
        # The row after the last class is "no class". The released table has one more row, which nothing uses.
        classes = config.num_classes + 2
        self.label_embed = nn.Embedding(classes, size.width, _weight=torch.empty(classes, size.width))
        if self.in_context:
            self.in_context_posemb = nn.Parameter(torch.empty(1, self.in_context, size.width))
        self.blocks = nn.ModuleList(Block(size.width, size.heads, size.qk_norm) for _ in range(size.depth))
        # norm1 and modulation of block i are used before the block runs, and FSDP gathers a module's parameters only
        # while that module runs.
        self.norm1 = nn.ModuleList(RMSNorm(size.width) for _ in range(size.depth))
        self.modulation = nn.ModuleList(Linear(size.width, 6 * size.width) for _ in range(size.depth))
        self.final_layer = FinalLayer(size.width, config.latent_channels)
        self.positions, self.head_dim = config.latent_tokens + config.patches, size.width // size.heads
        with torch.device("cpu"):  # arithmetic on the meta device would import torch._dynamo: a second
            cos, sin = self.rope()
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def add_embedding(self, config: ModelConfig) -> None:
        """Make the parameters of `embed`."""
        self.latent_tokens = nn.Parameter(torch.empty(1, config.latent_tokens, config.encoder.width))
        self.patch_embed = nn.Conv2d(3, config.encoder.width, config.patch_size, config.patch_size)

    def embed(self, x: Tensor, images: Tensor | None) -> Tensor:
        """Latents [B, N, C], and images [B, 3, S, S] as patch tokens after them -> [B, N, D] or [B, N + P, D]."""
        x = self.input_proj(x) + self.latent_tokens
        if images is None:
            return x
        return torch.cat((x, self.patch_embed(images).flatten(2).transpose(1, 2).to(x.dtype)), dim=1)

    def rope(self) -> tuple[Tensor, Tensor]:
        """Rotary tables, float32 [L + N + P, K / 2]."""
        return rope_table(self.positions, self.head_dim, self.in_context)

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor, data: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Encode data (with `data`) or denoise latents (without).

        Args:
            x: registers ~ N(0, 1) when encoding, noisy latents when denoising, [B, N, C].
            t: times, float32 [B].
            labels: int64 [B]; `no_class` for none.
            data: images [B, 3, S, S] in [0, 1], or None.
            lengths: latent tokens of each sample, int64 [B]; the others are pads, whose results mean nothing. None: no
                pads.

        Returns:
            Latents before LayerNorm, [B, N, C], float32 or the autocast dtype.
        """
        n = x.shape[1]
        x, mask = self.embed(x, data), key_mask(lengths, n)
        label = self.label_embed(labels)
        modulations, norms = self.modulations(F.silu(self.time_embed(t) + label))

        first = self.in_context  # the rotary table starts with rows for the in-context tokens
        rope = self.rope_cos[first : first + x.shape[1]], self.rope_sin[first : first + x.shape[1]]
        latents = 0, n
        h = kernels.adaln_modulate(x, *norms[0], out_dtype=matmul_dtype(x))
        for i, block in enumerate(self.blocks):
            if self.in_context and i == self.in_context_start:
                context = (label.unsqueeze(1) + self.in_context_posemb).to(x.dtype)
                h = torch.cat((kernels.adaln_modulate(context, *norms[i], out_dtype=h.dtype), h), dim=1)
                x = torch.cat((context, x), dim=1)
                rope = self.rope_cos[: x.shape[1]], self.rope_sin[: x.shape[1]]
                latents = first, first + n
            last = i == len(self.blocks) - 1
            x, h = block(x, h, modulations[i], norms[i + 1], *rope, latents if last else None, mask)
        return self.final_layer.linear(h)

    def modulations(self, condition: Tensor) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, Tensor, Tensor]]]:
        """The adaLN Linears of all blocks and of the final layer, applied to SiLU(c) [B, D].

        Returns:
            For each block gate_msa, shift_mlp, scale_mlp, gate_mlp; and for each norm1, then the final norm, weight,
            shift and scale.
        """
        # One matmul for all: each by itself is small, with a few hundred rows.
        linears = [*self.modulation, self.final_layer.modulation]
        joint = kernels.linears(condition, [m.weight for m in linears], [m.bias for m in linears])
        vectors = iter(joint.split(condition.shape[-1], dim=-1))
        modulations, norms = [], []
        for norm1 in self.norm1:
            shift, scale, *rest = itertools.islice(vectors, 6)
            norms.append((norm1.weight, shift, scale))
            modulations.append(tuple(rest))
        norms.append((self.final_layer.norm.weight, *vectors))
        return modulations, norms

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Initialise parameters as the released code does (docs/method.md, "Initialisation"), and fill the tables,
        which `to_empty` leaves undefined. In a sharded model every rank keeps its shard of the same values."""
        xavier, normal = nn.init.xavier_uniform_, nn.init.normal_
        for layer in self._linears():
            fill(layer.weight, xavier, generator=generator)
            fill(layer.bias, nn.init.zeros_)
        # Zero only now, so that the other values drawn from a seed do not depend on which Linears start at zero.
        for layer in [*self.modulation, self.final_layer.modulation, self.final_layer.linear]:
            fill(layer.weight, nn.init.zeros_)
            fill(layer.bias, nn.init.zeros_)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                fill(module.weight, nn.init.ones_)
        self.initialize_embedding(generator)
        fill(self.time_embed.frequencies, normal, generator=generator)
        for weight in (self.time_embed.fc1.weight, self.time_embed.fc2.weight, self.label_embed.weight):
            fill(weight, normal, std=0.02, generator=generator)
        if self.in_context:
            fill(self.in_context_posemb, normal, std=0.02, generator=generator)
        cos, sin = self.rope()
        self.rope_cos.copy_(cos)
        self.rope_sin.copy_(sin)

    def initialize_embedding(self, generator: torch.Generator) -> None:
        """Initialise the parameters of `embed`, except for the Linear of the latents."""
        fill(self.latent_tokens, lambda table: table.copy_(sincos_1d(torch.arange(table.shape[1]), table.shape[2])))
        # The released code keeps PyTorch's default here: uniform within 1 / sqrt(inputs).
        bound = self.patch_embed.weight[0].numel() ** -0.5
        fill(self.patch_embed.weight, nn.init.uniform_, -bound, bound, generator=generator)
        assert self.patch_embed.bias is not None
        fill(self.patch_embed.bias, nn.init.uniform_, -bound, bound, generator=generator)

    def _linears(self) -> Iterator[nn.Linear]:
        """In the order of initialisation: a block's adaLN Linear after its other Linears."""
        yield from (self.input_proj, self.time_embed.fc1, self.time_embed.fc2)
        for block, modulation in zip(self.blocks, self.modulation, strict=True):
            assert isinstance(block, Block) and isinstance(modulation, nn.Linear)
            yield from (block.attn.qkv, block.attn.proj, block.mlp.fc_in, block.mlp.fc_out, modulation)
        yield from (self.final_layer.modulation, self.final_layer.linear)
