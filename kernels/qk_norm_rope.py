"""qk_norm_rope: per-head RMSNorm and rotary embedding on packed q, k, v.

    q = rotate(rms_norm(q, q_weight)),  k = rotate(rms_norm(k, k_weight)),  v unchanged
    rotate: (a, b) -> (a cos - b sin, b cos + a sin) for each interleaved pair (2i, 2i + 1)

Shapes: qkv [B, T, 3 H K] (all of q, then all of k, then all of v), q_weight and k_weight [K] or None (no norm), cos and
sin [T, K / 2] -> q, k, v, each [B, H, T, K] in qkv's dtype, the layout that scaled_dot_product_attention reads. A token
that is not rotated has cos 1 and sin 0. Norm and rotation are float32.
Source: RoPE (Su et al., arXiv 2104.09864), q/k norm (Dehghani et al., arXiv 2302.05442).
"""

import torch
from torch import Tensor

from unite_fast.kernels.common import check, rms_norm, upcast


def qk_norm_rope(
    qkv: Tensor,
    heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split, normalise and rotate; see the module's docstring.

    Raises:
        ValueError: shapes that do not belong together.
    """
    op = "qk_norm_rope"
    check(qkv.dim() == 3, op, f"qkv must be [B, T, 3 * heads * head_dim], got {list(qkv.shape)}")
    t, packed = qkv.shape[1:]
    check(packed % (6 * heads) == 0, op, f"width {packed} is not 3 x {heads} heads of even size")
    head_dim = packed // (3 * heads)
    check((q_weight is None) == (k_weight is None), op, "q_weight and k_weight must both be given or both be None")
    if q_weight is not None:
        check(q_weight.shape == k_weight.shape == (head_dim,), op, f"q_weight and k_weight must be [{head_dim}]")
    check(cos.shape == sin.shape == (t, head_dim // 2), op, f"cos and sin must be [{t}, {head_dim // 2}]")
    return qk_norm_rope_ref(qkv, heads, q_weight, k_weight, cos, sin, eps)


def qk_norm_rope_ref(qkv, heads, q_weight, k_weight, cos, sin, eps=1e-6):
    b, t, packed = qkv.shape
    q, k, v = qkv.view(b, t, 3, heads, packed // (3 * heads)).permute(2, 0, 3, 1, 4)
    return rotate(q, q_weight, cos, sin, eps), rotate(k, k_weight, cos, sin, eps), v


def rotate(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Norm (with a weight) and rotation of one of q and k: x [B, H, T, K]."""
    normed = upcast(x) if weight is None else rms_norm(x, weight, eps)
    even, odd = normed.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.flatten(-2).to(x.dtype)
