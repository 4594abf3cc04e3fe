"""Bytes that the ops of an encoder block and of a decoder layer must read and write: every tensor that a pass takes or
returns, once.

Per (token x channel) of a block, with r bytes per element of the residual and 2 of everything else:

    gated_residual_adaln          forward r + 2 -> r + 2;  backward r + 2 + r + 2 -> r + 2            5 r + 10
    gated_residual_norm_adaln     the same                                                            5 r + 10
    qk_norm_rope                  forward 4 -> 4 (v stays where it is);  backward 6 + 4 -> 6          24
    swiglu                        8/3 of (forward 4 -> 2;  backward 2 + 4 -> 4)                       42.67
    sum                                                                                               10 r + 86.67

which is 126.67 with a float32 residual (r = 4) and 106.67 with a bfloat16 one. SwiGLU works on 8/3 channels per channel
of the block: its hidden width over the block's width. Attention that wrote the gradient of v directly into d_qkv would
save 4. `block_bytes` adds what this sum leaves out, weights, modulation and statistics, at the size of UNITE-B: about
0.3. Linears and attention itself are not counted. The gradients of biases cost nothing on the Triton backend: the
backward kernels sum them while they make the gradients (`kernels.shared_bias`).

The model saves less than the ops do by themselves, and recomputes the rest. In backward, the native backend runs the
forward passes of `RECOMPUTED` once more: h (r -> 2), swiglu (8/3 of 4 -> 2) and q and k (4 -> 4). With a float32
residual that is 6 + 16 + 8 = 30 more. The Triton kernels of the backward passes in `RETURNED_BY_BACKWARD` read those
inputs anyway and write the result too (2 and 8/3 of 2): 7.33 more.

Per (token x channel) of a decoder layer on the Triton backend, with what it recomputes:

    residual and LayerNorm, twice    forward r + 2 -> r + 2;  backward r + 2 + r -> r + 2 + 2             10 r + 20
    gelu                             4 of (forward 2 -> 2;  backward 2 + 2 -> 2 + 2)                      48
    split_heads                      forward nothing: views;  backward 6 -> 6, the gradient of qkv        12
    sum                                                                                                   10 r + 80
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from unite_fast.config import Config
from unite_fast.kernels.registry import OPS, Op, Size, empty
from unite_fast.planning.step_bytes import step_bytes
from unite_fast.recipes import from_tree

GOALS = 110, 95
"""For a block as the model runs it, with a float32 and with a bfloat16 residual. Without SwiGLU inside its matmuls they
are out of reach (docs/performance.md)."""
OTHERS = {"the released code, eager": 1123, "the same, compiled by Inductor": 303}
"""Bytes of a block with a float32 residual, counted when this project was designed; nothing here can repeat it."""
BLOCK_OPS = ("gated_residual_adaln", "gated_residual_norm_adaln", "qk_norm_rope", "swiglu")
RECOMPUTED = ("adaln_modulate", "swiglu", "qk_norm_rope")
"""Ops whose forward pass runs again when the model goes backward through a block, on the native backend."""
RETURNED_BY_BACKWARD = ("gated_residual_adaln", "swiglu")
"""Ops whose backward pass also returns a result of the forward pass, on the Triton backend."""
BACKENDS = ("native", "triton")


class Traffic(NamedTuple):
    """Bytes of the two passes of an op."""

    forward: int
    backward: int


def _one_of_qkv(size: Size) -> int:
    return size.batch * size.tokens * size.heads * size.head_dim * size.other.itemsize


def _unread_v(size: Size) -> Traffic:
    """v stays a view of qkv."""
    return Traffic(_one_of_qkv(size), _one_of_qkv(size))


def _unread_qkv(size: Size) -> Traffic:
    """The forward pass makes views; backward takes qkv for its shape."""
    bias = 3 * size.heads * size.head_dim * size.weights.itemsize
    return Traffic(3 * _one_of_qkv(size) + bias, 3 * _one_of_qkv(size))


UNREAD: dict[str, Callable[[Size], Traffic]] = {"qk_norm_rope": _unread_v, "split_heads": _unread_qkv}
"""Bytes of tensors that a pass takes or returns but does not touch."""


def op_traffic(op: Op, size: Size) -> Traffic:
    """Bytes that an op must read and write: every tensor that a pass takes or returns, once. What a backend writes and
    reads between two of its own kernels, such as partial sums of gradients, is not counted."""
    inputs = op.inputs(op.example(size, empty))
    outputs = op.fused.fake_forward(*inputs)
    backward_inputs = *op.fused.all_results(inputs, outputs), *op.fused.saved(inputs, outputs)
    gradients = op.fused.fake_backward(*backward_inputs)
    unread = UNREAD[op.name](size) if op.name in UNREAD else Traffic(0, 0)
    return Traffic(_nbytes(*inputs, *outputs) - unread.forward, _nbytes(*backward_inputs, *gradients) - unread.backward)


def _nbytes(*values) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def residual_dtypes(op: Op) -> tuple[torch.dtype, ...]:
    """Dtypes of the residual stream to measure an op with; bfloat16 alone if it has no such input."""
    size = Size(1, 2, 4, heads=2, head_dim=2, hidden=2, residual=torch.float64)
    inputs = op.inputs(op.example(size, empty))
    reads_residual = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in inputs)
    return (torch.float32, torch.bfloat16) if reads_residual else (torch.bfloat16,)


def block_bytes(residual: torch.dtype, backend: str = "native", recompute: bool = False) -> float:
    """Bytes per (token x channel) of the elementwise and norm work of one block, forward and backward: each op once, or
    with what the model recomputes."""
    b, t, d, hidden, other = 64, 544, 768, 2048, torch.bfloat16
    size = Size(b, t, d, heads=12, head_dim=64, hidden=hidden, residual=residual, other=other)
    moved = {name: op_traffic(OPS[name], size) for name in {*BLOCK_OPS, *RECOMPUTED}}
    total = sum(sum(moved[name]) for name in BLOCK_OPS)
    if recompute:
        h_and_swiglu = b * t * (d + hidden) * other.itemsize
        total += h_and_swiglu if backend == "triton" else sum(moved[name].forward for name in RECOMPUTED)
    return total / (b * t * d)


def decoder_layer_bytes(residual: torch.dtype) -> dict[str, float]:
    """Bytes per (token x channel) of the elementwise and norm work of one decoder layer, forward and backward, as the
    model runs it on the Triton backend."""
    b, t, d, hidden = 64, 257, 768, 3072
    size = Size(b, t, d, heads=12, head_dim=64, hidden=hidden, residual=residual, other=torch.bfloat16)
    gelu_again = b * t * hidden * size.other.itemsize
    moved = {
        "residuals and norms": 2 * _residual_norm_bytes(size),
        "gelu": sum(op_traffic(OPS["gelu"], size)) + gelu_again,
        "gradient of qkv": sum(op_traffic(OPS["split_heads"], size)),
    }
    return {name: total / (b * t * d) for name, total in moved.items()}


def _residual_norm_bytes(size: Size) -> int:
    """Bytes of residual_layer_norm_linear, forward and backward, without its Linear, which reads `normed`."""
    op = OPS["residual_layer_norm_linear"]
    inputs = op.inputs(op.example(size, empty))
    x_out, _, *statistics = op.fused.fake_forward(*inputs)
    normed = empty(*x_out.shape, dtype=size.other)
    saved = op.fused.saved(inputs, (x_out, normed, *statistics))
    d_x, d_branch, d_norm_weight, d_norm_bias, *_, d_branch_bias = op.fused.fake_backward(x_out, normed, *saved)
    forward = _nbytes(*inputs[:4], x_out, normed, *statistics)
    gradients = d_x, d_branch, d_norm_weight, d_norm_bias, d_branch_bias
    # Backward reads the gradients of x_out and normed, and writes normed once more.
    return forward + _nbytes(x_out, normed, x_out, *inputs[2:4], *statistics, *gradients, normed)


def step_report() -> str:
    """Bytes of a whole step per image at the size that docs/performance.md counts."""
    from step import SIZES  # which loads the trainer

    tree = {
        "model": SIZES["bench"],
        "train": {"batch_size": 8},
        "perceptual": {"weight": 0.0},
    }
    parts = step_bytes(from_tree(Config, tree))
    lines = ["a whole step, MB per image: 6 x 384 and 6 x 384, 8 images, F = 3, LPIPS off"]
    lines += [f"{name:48}{size / 1e6:10.1f}" for name, size in parts.items()]
    return "\n".join([*lines, f"{'sum':48}{sum(parts.values()) / 1e6:10.1f}"])


def block_report() -> str:
    lines = [f"{'elementwise and norm bytes per (token x channel)':48}{'float32':>10}{'bfloat16':>10}  residual"]
    lines += [f"{name:48}{count:10}" for name, count in OTHERS.items()]
    for backend in BACKENDS:
        for name, recompute in (("each op once", False), ("as the model runs them", True)):
            counts = (block_bytes(residual, backend, recompute) for residual in (torch.float32, torch.bfloat16))
            lines.append(f"{f'{backend}, {name}':48}" + "".join(f"{count:10.1f}" for count in counts))
    lines += [f"{'goal':48}" + "".join(f"{goal:10}" for goal in GOALS), "", "the same of a decoder layer, Triton"]
    of_layer = [decoder_layer_bytes(residual) for residual in (torch.float32, torch.bfloat16)]
    lines += [f"{name:48}" + "".join(f"{each[name]:10.1f}" for each in of_layer) for name in of_layer[0]]
    lines.append(f"{'sum':48}" + "".join(f"{sum(each.values()):10.1f}" for each in of_layer))
    return "\n".join(lines)
