"""The parts of the Generative Encoder.

Shapes: B batch, T tokens, D width, H heads, K head dimension.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unite_fast import kernels
from unite_fast.distributed.dtensor import copy_full


class RMSNorm(nn.Module):
    """Holds the weight of an RMSNorm; the fused ops in `unite_fast.kernels` apply it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class TimeEmbedding(nn.Module):
    """Random Fourier features of t (Tancik et al., arXiv 2006.10739) and a two-layer MLP, in float32."""

    frequencies: Tensor

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.register_buffer("frequencies", torch.empty(frequencies))
        self.fc1 = nn.Linear(2 * frequencies, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """t [B] in [0, 1] -> [B, D], float32."""
        with torch.autocast(t.device.type, enabled=False):
            angle = 2 * math.pi * t[:, None] * self.frequencies
            features = torch.cat((angle.sin(), angle.cos()), dim=-1)
            return self.fc2(F.silu(self.fc1(features)))


class Linear(nn.Linear):
    """nn.Linear computed by `kernels.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head self-attention with RMSNorm (optional) and RoPE on queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else None
        self.k_norm = RMSNorm(width // heads) if qk_norm else None
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        token_range: tuple[int, int] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            x: [B, T, D].
            cos, sin: rotary table, float32 [T, K / 2].
            token_range: (start, end); compute these tokens alone.
            mask: keys to attend to, bool [B, 1, 1, T]; None: all.

        Returns:
            The attended values [B, T, D], and the bias in them that still needs its gradient, [D], or None
            (`kernels.shared_bias`).
        """
        q_weight = None if self.q_norm is None else self.q_norm.weight
        k_weight = None if self.k_norm is None else self.k_norm.weight
        bias, qkv_bias = kernels.shared_bias(x, self.qkv.bias)
        qkv = kernels.linear(x, self.qkv.weight, bias, wide=True)
        attended = kernels.attention(qkv, self.heads, q_weight, k_weight, cos, sin, token_range, qkv_bias, mask)
        bias, proj_bias = kernels.shared_bias(attended, self.proj.bias)
        return kernels.linear(attended, self.proj.weight, bias, wide=True), proj_bias


def key_mask(lengths: Tensor | None, tokens: int) -> Tensor | None:
    """The tokens that are no pads, for attention: lengths [B] -> bool [B, 1, 1, tokens]; None for None."""
    if lengths is None:
        return None
    return real_tokens(lengths, tokens)[:, None, None]


def real_tokens(lengths: Tensor, tokens: int) -> Tensor:
    """Tokens that are no pads: lengths [B] -> bool [B, tokens]."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def hidden_width(width: int) -> int:
    """Hidden channels of a SwiGLU: int(2/3 * 4 width)."""
    return int(2 / 3 * 4 * width)


def hidden_padding(hidden: int) -> int:
    """Channels to add to make a hidden width a multiple of 64."""
    return -hidden % 64


class SwiGLU(nn.Module):
    """fc_out(SiLU(u) * w) with [u, w] = fc_in(h). `forward` also adds the attention branch and computes h by norm2."""

    def __init__(self, width: int):
        super().__init__()
        hidden = hidden_width(width)
        self.fc_in = nn.Linear(width, 2 * hidden)
        self.fc_out = nn.Linear(hidden, width)

    def forward(
        self,
        x: Tensor,
        branch: Tensor,
        branch_bias: Tensor | None,
        gate: Tensor,
        norm_weight: Tensor,
        shift: Tensor,
        scale: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        Args:
            x, branch: residual, and the attention output to add to it, [B, T, D].
            branch_bias: the bias in branch that still needs its gradient, [D], or None.
            gate, shift, scale: adaLN vectors, [B, D].
            norm_weight: weight of norm2, [D].

        Returns:
            x + gate * branch; the SwiGLU of its modulated norm; and the bias in that which still needs its gradient.
        """
        fc_in, bias_in, fc_out = self.weights(padded=x.is_cuda)
        bias_in, uw_bias = kernels.shared_bias(x, bias_in)
        vectors = gate, norm_weight, shift, scale
        x, uw = kernels.gated_residual_adaln_linear(x, branch, *vectors, fc_in, bias_in, branch_bias, wide=True)
        bias_out, mlp_bias = kernels.shared_bias(uw, self.fc_out.bias)
        return x, kernels.swiglu_linear(uw, fc_out, bias_out, uw_bias, wide=True), mlp_bias

    @property
    def padding(self) -> int:
        return hidden_padding(self.fc_out.in_features)

    def weights(self, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
        """fc_in's weight and bias, and fc_out's weight. `padded` appends zeros, which change no result, to make the
        hidden width a multiple of 64: rows of 2730 (width 1024) are unaligned, which makes matmuls slow on a GPU."""
        fc_in, bias_in, fc_out = self.fc_in.weight, self.fc_in.bias, self.fc_out.weight
        padding = self.padding
        if not padded or not padding:
            return fc_in, bias_in, fc_out
        fc_in = F.pad(fc_in.unflatten(0, (2, -1)), (0, 0, 0, padding)).flatten(0, 1)
        bias_in = F.pad(bias_in.unflatten(0, (2, -1)), (0, padding)).flatten()
        return fc_in, bias_in, F.pad(fc_out, (0, padding))


def matmul_weights(model: nn.Module) -> list[Tensor]:
    """Weights and biases that the ops round to bfloat16 for matmuls, for `kernels.casts.cast_once`. Not among them: the
    time embedding, which stays float32, and SwiGLU weights that are padded first."""
    excluded, linears = set(), []
    for module in model.modules():
        if isinstance(module, TimeEmbedding):
            excluded.update(module.parameters())
        elif isinstance(module, SwiGLU) and module.fc_out.weight.is_cuda and module.padding:
            excluded.update((module.fc_in.weight, module.fc_in.bias, module.fc_out.weight))
        elif isinstance(module, nn.Linear):
            linears.append(module)
    # All weights first, then all biases: `kernels.linears` need not concatenate copies that are adjacent in memory.
    parameters = [linear.weight for linear in linears] + [linear.bias for linear in linears]
    return [parameter for parameter in parameters if parameter not in excluded]


def fill(tensor: Tensor, draw: Callable[..., object], *arguments, **options) -> None:
    """Initialise a tensor by `draw(full, *arguments, **options)`. The full tensor is drawn on the CPU even if this rank
    holds a shard on a GPU, so the values are the same on all machines and for every world size."""
    value = torch.empty(tensor.shape, dtype=tensor.dtype)
    draw(value, *arguments, **options)
    copy_full(tensor, value)


def rope_table(positions: int, head_dim: int, unrotated: int = 0, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each float32 [unrotated + positions, head_dim / 2].

    The first `unrotated` rows have angle 0, for tokens without a position. Pair i at position p has the angle
    p * theta^(-2i / head_dim) (Su et al., arXiv 2104.09864).
    """
    rates = theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    angle = torch.outer(torch.arange(positions).double(), rates)
    angle = torch.cat((angle.new_zeros(unrotated, head_dim // 2), angle))
    return angle.cos().float(), angle.sin().float()


def sincos_1d(positions: Tensor, width: int) -> Tensor:
    """Sines, then cosines, at width / 2 geometric rates (Vaswani et al., arXiv 1706.03762): float32 [n, width]."""
    rates = 10000.0 ** (-torch.arange(width // 2).double() / (width // 2))
    angle = torch.outer(positions.double(), rates)
    return torch.cat((angle.sin(), angle.cos()), dim=-1).float()


def sincos_2d(side: int, width: int) -> Tensor:
    """Positions of a side x side grid in row-major order, column in the first half of the channels, row in the second:
    float32 [side * side, width]."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.cat((sincos_1d(column.flatten(), width // 2), sincos_1d(row.flatten(), width // 2)), dim=-1)
