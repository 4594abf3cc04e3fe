"""The Generative Encoder: one transformer that encodes images and denoises latents.

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
from unite_fast.model.layers import Attention, Linear, RMSNorm, SwiGLU, TimeEmbedding, fill, rope_table, sincos_1d


class Block(nn.Module):
    """One block, from the modulated input of its attention to the modulated input of the next block's.

    Cutting the network there, and not at the residual, lets each run of elementwise work between two matrix products be
    one kernel. What enters before that cut, norm1 and the adaLN Linear, is the encoder's.
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
        following: tuple[Tensor, Tensor, Tensor],
        cos: Tensor,
        sin: Tensor,
        wanted: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: the residual, [B, T, D].
            h: x normalised by norm1 and modulated, [B, T, D].
            modulation: gate1, shift2, scale2, gate2, each [B, D].
            following: norm weight [D], shift and scale [B, D] of what comes next: a block's norm1 or the final layer.
            wanted: first and last: compute only these tokens (all of them still serve as keys and values).

        Returns:
            x and h for what comes next.
        """
        gate1, shift2, scale2, gate2 = modulation
        attended = self.attn(h, cos, sin, wanted)
        if wanted is not None:
            x = x[:, slice(*wanted)]
        x, branch = self.mlp(x, attended, gate1, self.norm2.weight, shift2, scale2)
        return kernels.gated_residual_norm_adaln(
            x, branch, gate2, self.norm3.weight, *following, out_dtype=matmul_dtype(x)
        )


class FinalLayer(nn.Module):
    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm = RMSNorm(width)
        self.modulation = Linear(width, 2 * width)
        self.linear = Linear(width, channels)


class GenerativeEncoder(nn.Module):
    """See `forward`.

    The names `patch_embed`, `final_layer`, `in_context_posemb` and `latent_tokens` tell the optimizers whose they are.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = config.encoder
        self.in_context = size.in_context_tokens
        self.in_context_start = size.in_context_start
        self.no_class = config.num_classes
        self.input_proj = Linear(config.latent_channels, size.width)
        self.latent_tokens = nn.Parameter(torch.empty(1, config.latent_tokens, size.width))
        self.patch_embed = nn.Conv2d(3, size.width, config.patch_size, config.patch_size)
        self.time_embed = TimeEmbedding(size.width)
        # The released table has a row more than it uses; the row after the last class is "no class".
        self.label_embed = nn.Embedding(config.num_classes + 2, size.width)
        if self.in_context:
            self.in_context_posemb = nn.Parameter(torch.empty(1, self.in_context, size.width))
        self.blocks = nn.ModuleList(Block(size.width, size.heads, size.qk_norm) for _ in range(size.depth))
        # Of block i, but not inside it: they are used before block i runs, and a sharded module's parameters are whole
        # only while it runs itself.
        self.norm1 = nn.ModuleList(RMSNorm(size.width) for _ in range(size.depth))
        self.modulation = nn.ModuleList(Linear(size.width, 6 * size.width) for _ in range(size.depth))
        self.final_layer = FinalLayer(size.width, config.latent_channels)
        self.positions, self.head_dim = config.latent_tokens + config.patches, size.width // size.heads
        cos, sin = rope_table(self.positions, self.head_dim, self.in_context)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, images: Tensor | None = None) -> Tensor:
        """Latent tokens in, latent tokens out, not yet normalised.

        Args:
            x: registers or noisy latents, [B, N, C].
            t: times, float32 [B].
            labels: int64 [B]; `no_class` for none.
            images: [B, 3, S, S] in [0, 1]; given when encoding, absent when denoising.

        Returns:
            [B, N, C], float32 or the autocast dtype.
        """
        n = x.shape[1]
        x = self.input_proj(x) + self.latent_tokens
        if images is not None:
            x = torch.cat((x, self.patch_embed(images).flatten(2).transpose(1, 2).to(x.dtype)), dim=1)
        label = self.label_embed(labels)
        modulations, entries = self.modulations(F.silu(self.time_embed(t) + label))

        first = self.in_context  # rows of the rotary table before this one belong to in-context tokens
        rope = self.rope_cos[first : first + x.shape[1]], self.rope_sin[first : first + x.shape[1]]
        wanted = 0, n
        h = kernels.adaln_modulate(x, *entries[0], out_dtype=matmul_dtype(x))
        for i, block in enumerate(self.blocks):
            if self.in_context and i == self.in_context_start:
                context = (label.unsqueeze(1) + self.in_context_posemb).to(x.dtype)
                h = torch.cat((kernels.adaln_modulate(context, *entries[i], out_dtype=h.dtype), h), dim=1)
                x = torch.cat((context, x), dim=1)
                rope = self.rope_cos[: x.shape[1]], self.rope_sin[: x.shape[1]]
                wanted = first, first + n
            last = i == len(self.blocks) - 1
            x, h = block(x, h, modulations[i], entries[i + 1], *rope, wanted if last else None)
        return self.final_layer.linear(h)

    def modulations(self, condition: Tensor) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, Tensor, Tensor]]]:
        """Every adaLN product of SiLU(c) [B, D]: what each block needs itself (see `Block.forward`), and weight, shift
        and scale of each place that normalises and modulates on the way in: the blocks' norm1 and the final layer."""
        # One product of all, since each by itself is small: a few hundred rows.
        linears = [*self.modulation, self.final_layer.modulation]
        all_of_them = kernels.linears(condition, [m.weight for m in linears], [m.bias for m in linears])
        vectors = iter(all_of_them.split(condition.shape[-1], dim=-1))
        modulations, entries = [], []
        for norm1 in self.norm1:
            shift, scale, *own = itertools.islice(vectors, 6)
            entries.append((norm1.weight, shift, scale))
            modulations.append(tuple(own))
        entries.append((self.final_layer.norm.weight, *vectors))
        return modulations, entries

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """The released start values (spec: "Start values"), drawn from `generator`, and the tables, which a model that
        was built without memory lacks. Of a sharded model, each process keeps its part of the same values."""
        xavier, normal = nn.init.xavier_uniform_, nn.init.normal_
        for layer in self._linears():
            fill(layer.weight, xavier, generator=generator)
            fill(layer.bias, nn.init.zeros_)
        # Only now zero: a seed's other values must not depend on which Linears start so.
        for layer in [*self.modulation, self.final_layer.modulation, self.final_layer.linear]:
            fill(layer.weight, nn.init.zeros_)
            fill(layer.bias, nn.init.zeros_)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                fill(module.weight, nn.init.ones_)
        fill(self.latent_tokens, lambda table: table.copy_(sincos_1d(torch.arange(table.shape[1]), table.shape[2])))
        # The released code leaves this one as PyTorch makes it: uniform within 1 / sqrt(inputs).
        bound = self.patch_embed.weight[0].numel() ** -0.5
        fill(self.patch_embed.weight, nn.init.uniform_, -bound, bound, generator=generator)
        fill(self.patch_embed.bias, nn.init.uniform_, -bound, bound, generator=generator)
        fill(self.time_embed.frequencies, normal, generator=generator)
        for weight in (self.time_embed.fc1.weight, self.time_embed.fc2.weight, self.label_embed.weight):
            fill(weight, normal, std=0.02, generator=generator)
        if self.in_context:
            fill(self.in_context_posemb, normal, std=0.02, generator=generator)
        cos, sin = rope_table(self.positions, self.head_dim, self.in_context)
        self.rope_cos.copy_(cos)
        self.rope_sin.copy_(sin)

    def _linears(self) -> Iterator[nn.Linear]:
        """In the order in which they are drawn: a block's adaLN Linear after its others."""
        yield from (self.input_proj, self.time_embed.fc1, self.time_embed.fc2)
        for block, modulation in zip(self.blocks, self.modulation, strict=True):
            yield from (block.attn.qkv, block.attn.proj, block.mlp.fc_in, block.mlp.fc_out, modulation)
        yield from (self.final_layer.modulation, self.final_layer.linear)
