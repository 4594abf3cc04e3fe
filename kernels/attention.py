"""attention: from packed q, k, v to the attended values."""

import torch
from torch import Tensor
from torch.nn import functional as F

from unite_fast.kernels import backend, tensors
from unite_fast.kernels.attention_backends import ATTEND, masked
from unite_fast.kernels.fused_op import Backend, FusedOp
from unite_fast.kernels.matmul import in_float32
from unite_fast.kernels.qk_norm_rope import (
    check,
    qk_inputs,
    qk_norm_rope,
    qk_norm_rope_op,
    split,
    split_heads,
    view_of_v,
)
from unite_fast.kernels.registry import register
from unite_fast.kernels.tensors import EPS, argument_error


def attention_ref(qkv, heads, q_weight, k_weight, cos, sin, token_range=None, qkv_bias=None, mask=None):
    name = backend.attention_on(qkv.device)
    attend = ATTEND[name] if mask is None else masked(name, mask)
    if mask is not None:
        # Attention multiplies the values of masked tokens by 0, which would leave a NaN in the result.
        qkv = torch.where(mask[:, 0, 0, :, None], tensors.containing(qkv, qkv_bias), 0)
        qkv_bias = None
    if cos is None:
        q, k, v = split_heads(qkv, heads, qkv_bias) if qkv_bias is not None else split(qkv, heads)
    else:
        q, k, v = qk_norm_rope(qkv, heads, q_weight, k_weight, cos, sin, EPS, qkv_bias)
    if token_range is not None:
        q = q[:, :, slice(*token_range)]
    return attend(q, k, v).transpose(1, 2).flatten(2)


def _in_float32(qkv):
    """Whether the products of attention run in float32 after an (exact) cast."""
    name = backend.attention_on(qkv.device)
    return in_float32(qkv) if name == "sdpa" else name == "sdpa_float32"


def _prepare(qkv, q_weight, k_weight, cos, sin, heads):
    """q, k, v [B, H, T, K] in the dtype of attention's products, and the rstd of q and k."""
    if cos is None:
        q, k, v, rstd = *split(qkv, heads), None
    else:
        forward = qk_norm_rope_op.backends["native"].forward
        q, k, rstd = forward(qkv, q_weight, k_weight, None, cos, sin, heads, EPS)
        v = view_of_v(qkv, heads)
    return (*(x.float() for x in (q, k, v)), rstd) if _in_float32(qkv) else (q, k, v, rstd)


def _fake_forward(qkv, q_weight, k_weight, cos, sin, heads, first, last):
    b, _, packed = qkv.shape
    out = qkv.new_empty((b, last - first, packed // 3))
    return out, qkv.new_empty((b, last - first, heads), dtype=torch.float32).transpose(1, 2)


def _native_forward(qkv, q_weight, k_weight, cos, sin, heads, first, last):
    q, k, v, _ = _prepare(qkv, q_weight, k_weight, cos, sin, heads)
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[:, :, first:last], k, v)
    return out.transpose(1, 2).to(qkv.dtype).flatten(2), log_sum


def _fake_backward(d_out, qkv, q_weight, k_weight, cos, sin, out, log_sum, first):
    return (
        tensors.empty_like(qkv),
        tensors.empty_weight_gradient(q_weight, qkv),
        tensors.empty_weight_gradient(k_weight, qkv),
    )


def _native_backward(d_out, qkv, q_weight, k_weight, cos, sin, out, log_sum, first):
    heads, last = log_sum.shape[1], first + log_sum.shape[2]
    q, k, v, rstd = _prepare(qkv, q_weight, k_weight, cos, sin, heads)
    d_out, out = (x.to(q.dtype).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (d_out, out))
    d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, q[:, :, first:last], k, v, out, log_sum, 0.0, False
    )
    if d_q.shape != k.shape:
        d_q = F.pad(d_q, (0, 0, first, k.shape[2] - last))
    if rstd is None:
        d_qkv = tensors.empty_like(qkv)
        for part, gradient in zip(split(d_qkv, heads), (d_q, d_k, d_v), strict=True):
            part.copy_(gradient)
        return d_qkv, *(tensors.empty_weight_gradient(None, qkv) for _ in range(2))
    gradients = (x.to(qkv.dtype) for x in (d_q, d_k, d_v))
    inputs = *gradients, qkv, q_weight, k_weight, cos, sin, rstd
    return qk_norm_rope_op.backends["native"].backward(*inputs, False)[:3]


attention_op = FusedOp(
    "attention",
    inputs="Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, SymInt heads, SymInt first, "
    "SymInt last",
    outputs=2,
    fake_forward=_fake_forward,
    backward_inputs="Tensor d_out, Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, "
    "Tensor out, Tensor log_sum, SymInt first",
    backward_outputs=3,
    fake_backward=_fake_backward,
    saved=lambda inputs, outputs: (*inputs[:5], *outputs, inputs[6]),
    backends={"native": Backend(_native_forward, _native_backward)},
)


def attention(
    qkv: Tensor,
    heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    token_range: tuple[int, int] | None = None,
    qkv_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention on packed q, k, v, with `qk_norm_rope` before it.

        q, k, v = qk_norm_rope(qkv)
        out     = softmax(q k^T / sqrt(K)) v

    In bfloat16, the native backend saves qkv and the result for backward, and recomputes q and k there. Source:
    FlashAttention (Dao et al., arXiv 2205.14135), through attention_backends.py.

    With a mask, PyTorch's scaled_dot_product_attention runs on every device. Nothing of a masked token reaches the
    result of another token or a gradient, not even a NaN. Its own result means nothing.

    Args:
        qkv: [B, T, 3 H K]: all of q, then all of k, then all of v.
        heads: H.
        q_weight: [K], or None for no norm.
        k_weight: [K], or None for no norm.
        cos: float32 [T, K / 2], or None for neither norm nor rotation.
        sin: float32 [T, K / 2], or None for neither norm nor rotation.
        token_range: (first, last); only the queries of these tokens attend. None for all.
        qkv_bias: [3 H K], the bias that qkv contains, or None; gets the sum of qkv's gradient (`linear.shared_bias`).
        mask: bool [B, 1, 1, T], True for the tokens whose keys are read, at least one in each sample; None for all.

    Returns:
        [B, T, H K], or [B, last - first, H K], in qkv's dtype.

    Raises:
        ValueError: shapes that do not match.
    """
    if cos is not None:
        check("attention", qkv, heads, q_weight, k_weight, cos, sin)
    if mask is not None and (mask.shape != (qkv.shape[0], 1, 1, qkv.shape[1]) or mask.dtype != torch.bool):
        expected = f"bool {[qkv.shape[0], 1, 1, qkv.shape[1]]}"
        raise argument_error("attention", f"mask must be {expected}, got {mask.dtype} {list(mask.shape)}")
    if backend.choose(qkv) != "native" or qkv.dtype != torch.bfloat16 or mask is not None:
        return attention_ref(qkv, heads, q_weight, k_weight, cos, sin, token_range, qkv_bias, mask)
    qkv = tensors.containing(qkv, qkv_bias)
    return attention_op("native", *_op_inputs(qkv, heads, q_weight, k_weight, cos, sin, token_range))


def _op_inputs(qkv, heads, q_weight, k_weight, cos, sin, token_range) -> tuple:
    first, last = token_range or (0, qkv.shape[1])
    return qkv, q_weight, k_weight, cos, sin, heads, first, last


register(
    attention,
    attention_ref,
    attention_op,
    example=lambda size, new: qk_inputs(size, new) | {"token_range": (1, size.tokens)},
    part="composed",
    op_inputs=_op_inputs,
)
