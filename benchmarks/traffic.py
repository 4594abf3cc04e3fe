"""Bytes that the ops must move, by shape and type: every tensor that a pass takes or gives, once.

`A, B -> C` in a docstring names the tensors of a pass; the forward pass stands before the semicolon. Numbers that a
body keeps for itself between two of its kernels (partial sums of gradients) are not counted.

One encoder block, bytes per (token x channel), r bytes an element of the residual and 2 of everything else:

    gated_residual_adaln          forward r + 2 -> r + 2;  backward r + 2 + r + 2 -> r + 2            5 r + 10
    gated_residual_norm_adaln     the same                                                            5 r + 10
    qk_norm_rope                  forward 4 -> 4 (v stays where it is);  backward 6 + 4 -> 6          24
    swiglu                        8/3 of (forward 4 -> 2;  backward 2 + 4 -> 4)                       42.67
    sum                                                                                               10 r + 86.67

which is 126.67 with a float32 residual (r = 4) and 106.67 with a bfloat16 one. SwiGLU works on 8/3 channels for each
channel of the block: its hidden width over the block's. Attention that wrote the gradient of v into its place in d_qkv
would save 4. A body that copies v, as the Triton one does, moves 4 more. `block_bytes` adds what this sum leaves out,
weights, modulation and statistics, at the size of UNITE-B: 0.3 or so. Linears and attention itself are not counted.

The model keeps less than the ops by themselves do. The backward pass of the native body makes again h (r -> 2), swiglu
(8/3 of 4 -> 2) and q and k (4 -> 4): `MADE_AGAIN`. With a float32 residual that is 6 + 16 + 8 = 30 more. In the Triton
body, the kernels that go back through h's norm and swiglu write these too (2 and 8/3 of 2), from what they read anyway:
7.33 more.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

FLOAT = 4
"""Bytes of a weight or a statistic."""
TARGET = 130
"""For a block with a float32 residual."""
OTHERS = {"the released code, eager": 1123, "the same, compiled by Inductor": 303}
"""Bytes of a block with a float32 residual, counted when this project was designed; nothing here can repeat it."""
BLOCK_OPS = ("gated_residual_adaln", "gated_residual_norm_adaln", "qk_norm_rope", "swiglu")
MADE_AGAIN = ("adaln_modulate", "swiglu", "qk_norm_rope")
"""The ops whose forward pass runs a second time when the model goes back through a block, in the native body."""
WRITTEN_AGAIN = ("gated_residual_adaln", "swiglu")
"""The ops whose backward pass gives a result of the forward pass too, in the Triton body."""
BODIES = ("native", "triton")


class Traffic(NamedTuple):
    """Bytes of the two passes."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Sizes:
    """Of an op on a sequence; properties are bytes."""

    batch: int
    tokens: int
    width: int
    heads: int
    hidden: int
    """Of SwiGLU."""
    residual: torch.dtype
    other: torch.dtype
    """Of branch, modulation and results."""

    @property
    def x(self) -> int:
        return self.batch * self.tokens * self.width * self.residual.itemsize

    @property
    def h(self) -> int:
        return self.batch * self.tokens * self.width * self.other.itemsize

    @property
    def gated(self) -> int:
        """SwiGLU's result."""
        return self.batch * self.tokens * self.hidden * self.other.itemsize

    @property
    def vector(self) -> int:
        return self.batch * self.width * self.other.itemsize

    @property
    def weight(self) -> int:
        return self.width * FLOAT

    @property
    def inverse(self) -> int:
        return self.batch * self.tokens * FLOAT

    @property
    def head_weights(self) -> int:
        return 2 * self.width // self.heads * FLOAT

    @property
    def tables(self) -> int:
        return 2 * self.tokens * (self.width // self.heads // 2) * FLOAT


def adaln_modulate(s: Sizes) -> Traffic:
    """x, weight, shift, scale -> h, inverse; d_h, x, weight, scale, inverse -> d_x, d_weight, d_shift, d_scale"""
    taken = s.x + s.weight + 2 * s.vector
    return Traffic(taken + s.h + s.inverse, (s.h + s.x + s.weight + s.vector + s.inverse) + taken)


def gated_residual_adaln(s: Sizes) -> Traffic:
    """x, branch, gate, weight, shift, scale -> x_out, h, inverse; d_x_out, d_h, x_out, branch, gate, weight, scale,
    inverse -> d_x, d_branch, d_gate, d_weight, d_shift, d_scale"""
    taken, given = s.x + s.h + s.weight + 3 * s.vector, s.x + s.h
    kept = s.x + s.h + s.weight + 2 * s.vector + s.inverse
    return Traffic(taken + given + s.inverse, given + kept + taken)


def gated_residual_norm_adaln(s: Sizes) -> Traffic:
    """As gated_residual_adaln, which keeps x_out where this keeps x, with one weight and one inverse more."""
    forward, backward = gated_residual_adaln(s)
    return Traffic(forward + s.weight + s.inverse, backward + 2 * s.weight + s.inverse)


def qk_norm_rope(s: Sizes, v_copied: bool = False) -> Traffic:
    """q, k, weights, tables -> q, k, inverse, and v -> v where it is copied; d_q, d_k, d_v, q, k, weights, tables,
    inverse -> d_qkv, d_weights"""
    inverse, parts = 2 * s.heads * s.inverse, 3 if v_copied else 2
    forward = parts * s.h + s.head_weights + s.tables + parts * s.h + inverse
    kept = 2 * s.h + s.head_weights + s.tables + inverse
    return Traffic(forward, 3 * s.h + kept + 3 * s.h + s.head_weights)


def swiglu(s: Sizes) -> Traffic:
    """u, w -> out; d_out, u, w -> d_u, d_w"""
    return Traffic(3 * s.gated, 5 * s.gated)


@dataclass(frozen=True)
class Latents:
    """Of an op on F draws of latents; properties are bytes."""

    draws: int
    batch: int
    tokens: int
    channels: int
    dtype: torch.dtype

    @property
    def z(self) -> int:
        return self.batch * self.tokens * self.channels * self.dtype.itemsize

    @property
    def times(self) -> int:
        return self.draws * self.batch * FLOAT

    @property
    def statistic(self) -> int:
        return self.draws * self.batch * self.tokens * FLOAT

    @property
    def weight(self) -> int:
        return self.channels * FLOAT


def noise_injection(s: Latents) -> Traffic:
    """z, t, positions, gate -> x_t in float32; d_x_t, t, gate -> d_z in float32"""
    one = s.batch * s.tokens * s.channels * FLOAT
    positions, gate = s.batch * 8, s.batch
    return Traffic(s.z + s.times + positions + gate + s.draws * one, s.draws * one + s.times + gate + one)


def flow_loss(s: Latents) -> Traffic:
    """y, weight, bias, z, t -> loss, share, mean, inverse; d_loss, y, weight, bias, z, share, mean, inverse -> d_y,
    d_weight, d_bias"""
    y, statistics = s.draws * s.z, s.times + 2 * s.statistic
    taken = y + 2 * s.weight + s.z
    return Traffic(taken + s.times + s.times + statistics, s.times + taken + statistics + y + 2 * s.weight)


def block_bytes(residual: torch.dtype, body: str = "native", made_again: bool = False) -> float:
    """Bytes per (token x channel) of one block's elementwise and norm work, forward and backward: the ops by
    themselves, or with what the model makes again."""
    s = Sizes(batch=64, tokens=544, width=768, heads=12, hidden=2048, residual=residual, other=torch.bfloat16)
    moved = {
        "adaln_modulate": adaln_modulate(s),
        "gated_residual_adaln": gated_residual_adaln(s),
        "gated_residual_norm_adaln": gated_residual_norm_adaln(s),
        "qk_norm_rope": qk_norm_rope(s, v_copied=body == "triton"),
        "swiglu": swiglu(s),
    }
    total = sum(sum(moved[op]) for op in BLOCK_OPS)
    if made_again:
        total += s.h + s.gated if body == "triton" else sum(moved[op].forward for op in MADE_AGAIN)
    return total / (s.batch * s.tokens * s.width)


def block_report() -> str:
    lines = [f"{'elementwise and norm bytes per (token x channel)':48}{'float32':>10}{'bfloat16':>10}  residual"]
    lines += [f"{name:48}{count:10}" for name, count in OTHERS.items()]
    for body in BODIES:
        for name, made_again in (("each op once", False), ("as the model runs them", True)):
            counts = (block_bytes(residual, body, made_again) for residual in (torch.float32, torch.bfloat16))
            lines.append(f"{f'{body}, {name}':48}" + "".join(f"{count:10.1f}" for count in counts))
    return "\n".join([*lines, f"{'target':48}{TARGET:10}"])
