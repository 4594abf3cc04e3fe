"""attention: from packed q, k, v to the attended values.

    q, k, v = qk_norm_rope(qkv)
    out     = softmax(q k^T / sqrt(K)) v

Shapes: qkv [B, T, 3 H K], q_weight and k_weight [K] or None (no norm), cos and sin [T, K / 2] or None (no norm, no
rotation) -> [B, T, H K]. `wanted` = (first, last) asks for the rows of these queries alone: [B, last - first, H K].
Source: FlashAttention (Dao et al., arXiv 2205.14135), as attention_backends.py has it.

In bfloat16, the native body keeps qkv and the result for the backward pass, and makes q and k again there.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from unite_fast.kernels import backend, layout
from unite_fast.kernels.attention_backends import ATTEND
from unite_fast.kernels.common import EPS
from unite_fast.kernels.op import Body, FusedOp
from unite_fast.kernels.product import in_float32
from unite_fast.kernels.qk_norm_rope import _fused as qk_op
from unite_fast.kernels.qk_norm_rope import check, qk_norm_rope, split


def attention_ref(qkv, heads, q_weight, k_weight, cos, sin, wanted=None):
    q, k, v = split(qkv, heads) if cos is None else qk_norm_rope(qkv, heads, q_weight, k_weight, cos, sin, EPS)
    if wanted is not None:
        q = q[:, :, slice(*wanted)]
    attend = ATTEND[backend.attention_on(qkv.device)]
    return attend(q, k, v).transpose(1, 2).flatten(2)


def _prepare(qkv, q_weight, k_weight, cos, sin, heads):
    """q, k, v [B, H, T, K] for the products, and the inverse RMS of q and k."""
    if cos is None:
        q, k, v, inverse = *split(qkv, heads), None
    else:
        q, k, v, inverse = qk_op.bodies["native"].eager_forward(qkv, q_weight, k_weight, cos, sin, heads, EPS)
    return (*(x.float() for x in (q, k, v)), inverse) if in_float32(qkv) else (q, k, v, inverse)


def _like_forward(qkv, q_weight, k_weight, cos, sin, heads, first, last):
    b, _, packed = qkv.shape
    out = qkv.new_empty((b, last - first, packed // 3))
    return out, qkv.new_empty((b, last - first, heads), dtype=torch.float32).transpose(1, 2)


def _native_forward(qkv, q_weight, k_weight, cos, sin, heads, first, last):
    q, k, v, _ = _prepare(qkv, q_weight, k_weight, cos, sin, heads)
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[:, :, first:last], k, v)
    return out.transpose(1, 2).to(qkv.dtype).flatten(2), log_sum


def _like_backward(d_out, qkv, q_weight, k_weight, cos, sin, out, log_sum, first):
    return layout.room(qkv), layout.room_floats(q_weight, qkv), layout.room_floats(k_weight, qkv)


def _native_backward(d_out, qkv, q_weight, k_weight, cos, sin, out, log_sum, first):
    heads, last = log_sum.shape[1], first + log_sum.shape[2]
    q, k, v, inverse = _prepare(qkv, q_weight, k_weight, cos, sin, heads)
    d_out, out = (x.to(q.dtype).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (d_out, out))
    d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, q[:, :, first:last], k, v, out, log_sum, 0.0, False
    )
    if d_q.shape != k.shape:
        d_q = F.pad(d_q, (0, 0, first, k.shape[2] - last))
    if inverse is None:
        d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        for part, gradient in zip(split(d_qkv, heads), (d_q, d_k, d_v), strict=True):
            part.copy_(gradient)
        return d_qkv, *(layout.room_floats(None, qkv) for _ in range(2))
    gradients = (x.to(qkv.dtype) for x in (d_q, d_k, d_v))
    return qk_op.bodies["native"].backward(*gradients, qkv, q_weight, k_weight, cos, sin, inverse)


_fused = FusedOp(
    "attention",
    inputs="Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, SymInt heads, SymInt first, "
    "SymInt last",
    outputs="Tensor, Tensor",
    results=1,
    like_forward=_like_forward,
    backward_inputs="Tensor d_out, Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, "
    "Tensor out, Tensor log_sum, SymInt first",
    backward_outputs="Tensor, Tensor, Tensor",
    like_backward=_like_backward,
    saved=lambda inputs, outputs: (*inputs[:5], *outputs, inputs[6]),
    bodies={"native": Body(_native_forward, _native_backward)},
)


def attention(
    qkv: Tensor,
    heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    wanted: tuple[int, int] | None = None,
) -> Tensor:
    """Attend; see the module's docstring.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if cos is not None:
        check("attention", qkv, heads, q_weight, k_weight, cos, sin)
    if backend.choose(qkv) != "native" or qkv.dtype != torch.bfloat16:
        return attention_ref(qkv, heads, q_weight, k_weight, cos, sin, wanted)
    first, last = wanted or (0, qkv.shape[1])
    return _fused("native", qkv, q_weight, k_weight, cos, sin, heads, first, last)
