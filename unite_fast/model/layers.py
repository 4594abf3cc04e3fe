"""The parts of the Generative Encoder.

Shapes: B batch, T tokens, D width, H heads, K head dimension.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unite_fast import kernels
from unite_fast.distributed.dtensor import copy_whole


class RMSNorm(nn.Module):
    """Holds the weight of an RMSNorm; the fused ops in `unite_fast.kernels` apply it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class TimeEmbedding(nn.Module):
    """Random Fourier features of t (Tancik et al., arXiv 2006.10739) and a two-layer MLP, in float32."""

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
    """nn.Linear, by way of `kernels.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head self-attention with normalised, rotated queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else None
        self.k_norm = RMSNorm(width // heads) if qk_norm else None
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, wanted: tuple[int, int] | None = None) -> Tensor:
        """x [B, T, D], cos and sin [T, K / 2] -> [B, T, D], or only the tokens `wanted` = (first, last) of it."""
        q_weight = None if self.q_norm is None else self.q_norm.weight
        k_weight = None if self.k_norm is None else self.k_norm.weight
        qkv = self.qkv(x)
        return self.proj(kernels.attention(qkv, self.heads, q_weight, k_weight, cos, sin, wanted))


def hidden_width(width: int) -> int:
    """Of a SwiGLU of this width (spec: Sizes)."""
    return int(2 / 3 * 4 * width)


class SwiGLU(nn.Module):
    """Linear, SiLU(u) * w, Linear. The hidden width is int(2/3 * 4 D)."""

    def __init__(self, width: int):
        super().__init__()
        hidden = hidden_width(width)
        self.fc_in = nn.Linear(width, 2 * hidden)
        self.fc_out = nn.Linear(hidden, width)

    def forward(
        self, x: Tensor, branch: Tensor, gate: Tensor, norm_weight: Tensor, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """From the residual and the branch to be added to it, both [B, T, D], with norm weight [D] and gate, shift and
        scale [B, D]: the new residual and the SwiGLU of it, normalised and modulated."""
        fc_in, bias_in, fc_out = self.weights(padded=x.is_cuda)
        x, uw = kernels.gated_residual_adaln_linear(x, branch, gate, norm_weight, shift, scale, fc_in, bias_in)
        return x, kernels.swiglu_linear(uw, fc_out, self.fc_out.bias)

    @property
    def missing(self) -> int:
        """What the hidden width lacks to be a multiple of 64."""
        return -self.fc_out.in_features % 64

    def weights(self, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
        """fc_in's weight and bias and fc_out's weight; padded by zeros, which change nothing, to a hidden width that
        is a multiple of 64. Rows of 2730 (widths 1024) are not aligned, and such products are slow on a GPU."""
        fc_in, bias_in, fc_out = self.fc_in.weight, self.fc_in.bias, self.fc_out.weight
        missing = self.missing
        if not padded or not missing:
            return fc_in, bias_in, fc_out
        fc_in = F.pad(fc_in.unflatten(0, (2, -1)), (0, 0, 0, missing)).flatten(0, 1)
        bias_in = F.pad(bias_in.unflatten(0, (2, -1)), (0, missing)).flatten()
        return fc_in, bias_in, F.pad(fc_out, (0, missing))


def product_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights and biases that `kernels` rounds for products: what `kernels.casts.cast_once` is for. Left out are
    the time embedding, which stays float32, and SwiGLU's weights where they are padded first on a GPU."""
    others = set()
    for module in model.modules():
        if isinstance(module, TimeEmbedding):
            others.update(module.parameters())
        elif isinstance(module, SwiGLU) and module.fc_out.weight.is_cuda and module.missing:
            others.update((module.fc_in.weight, module.fc_in.bias, module.fc_out.weight))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    # Weights beside weights: `kernels.linears` takes several as one.
    every = [linear.weight for linear in linears] + [linear.bias for linear in linears]
    return [parameter for parameter in every if parameter not in others]


def fill(tensor: Tensor, draw: Callable[..., object], *arguments, **options) -> None:
    """Give a tensor its start value: draw(whole, *arguments, **options), drawn whole on a CPU, whatever part of it this
    process holds and wherever. So the numbers are the same on all machines and for every number of processes."""
    value = torch.empty(tensor.shape, dtype=tensor.dtype)
    draw(value, *arguments, **options)
    copy_whole(tensor, value)


def rope_table(positions: int, head_dim: int, unrotated: int = 0, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each float32 [unrotated + positions, head_dim / 2].

    The first `unrotated` rows turn by nothing: they are for tokens without a position. Pair i of position p turns by
    p * theta^(-2i / head_dim).
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
