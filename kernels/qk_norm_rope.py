"""qk_norm_rope: per-head RMSNorm and rotary embedding on packed q, k, v.

    q = rotate(rms_norm(q, q_weight)),  k = rotate(rms_norm(k, k_weight)),  v unchanged
    rotate: (a, b) -> (a cos - b sin, b cos + a sin) for each interleaved pair (2i, 2i + 1)

Shapes: qkv [B, T, 3 H K] (all of q, then all of k, then all of v), q_weight and k_weight [K] or None (no norm), cos and
sin [T, K / 2] -> q, k, v, each [B, H, T, K] in qkv's dtype, as scaled_dot_product_attention reads them. The Triton
body writes them in the order [B, T, H, K]: attention on a GPU gives its result in the order of q, which then is
[B, T, H K] without a copy. A token that is not rotated has cos 1 and sin 0. Norm and rotation are float32. cos and sin
get no gradient.
Source: RoPE (Su et al., arXiv 2104.09864), q/k norm (Dehghani et al., arXiv 2302.05442).
"""

import torch
from torch import Tensor

from unite_fast.kernels import backend, layout, native
from unite_fast.kernels.common import mistake, rms_norm, upcast
from unite_fast.kernels.op import Body, FusedOp, triton_body


def qk_norm_rope_ref(qkv, heads, q_weight, k_weight, cos, sin, eps=1e-6):
    q, k, v = split(qkv, heads)
    return rotate(q, q_weight, cos, sin, eps), rotate(k, k_weight, cos, sin, eps), v


def split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """The three parts of qkv as views [B, H, T, K]."""
    # In this order, the gradient of qkv is put together by one copy.
    return tuple(part.transpose(1, 2) for part in qkv.unflatten(-1, (3, heads, -1)).unbind(2))


def rotate(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Norm (with a weight) and rotation of one of q and k: x [B, H, T, K]."""
    normed = upcast(x) if weight is None else rms_norm(x, weight, eps)
    even, odd = normed.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def _like_forward(qkv, q_weight, k_weight, cos, sin, heads, eps):
    b, t, packed = qkv.shape
    head_dim = packed // (3 * heads)
    if backend.fused_body_on(qkv.device) == "triton":
        q, k, v = (qkv.new_empty((b, t, heads, head_dim)).transpose(1, 2) for _ in range(3))
    else:
        q, k, v = (qkv.new_empty((b, heads, t, head_dim)) for _ in range(3))
    return q, k, v, qkv.new_empty((b, t, 2, heads), dtype=torch.float32)


def _native_eager_forward(qkv, q_weight, k_weight, cos, sin, heads, eps):
    b, t, packed = qkv.shape
    head_dim = packed // (3 * heads)
    qkv = layout.dense(qkv)
    q_weight, k_weight, cos, sin = (layout.floats(x) for x in (q_weight, k_weight, cos, sin))
    shape = (b, heads, t, head_dim)
    # Dense: scaled_dot_product_attention is 0 to 8 % faster on these than on the order [B, T, H, K], which would be
    # written in one go. v, which is only summed, may stay where it is.
    q, k = qkv.new_empty(shape), qkv.new_empty(shape)
    inverse = qkv.new_empty((b, t, 2, heads), dtype=torch.float32)
    native.run(
        "qk_norm_rope_forward",
        *(b, t, heads, head_dim, eps),
        *native.rows(qkv),
        *map(native.address, (q_weight, k_weight, cos, sin, inverse)),
        *native.heads(q),
        *native.heads(k),
    )
    v = qkv.as_strided(shape, (qkv.stride(0), head_dim, qkv.stride(1), 1), qkv.storage_offset() + 2 * heads * head_dim)
    return q, k, v, inverse


def _native_forward(*inputs):
    q, k, v, inverse = _native_eager_forward(*inputs)
    # What an op gives must not share memory with what it took.
    return q, k, torch.empty_like(q).copy_(v), inverse


def _like_backward(d_q, d_k, d_v, qkv, q_weight, k_weight, cos, sin, inverse):
    return layout.room(qkv), layout.room_floats(q_weight, qkv), layout.room_floats(k_weight, qkv)


def _native_backward(d_q, d_k, d_v, qkv, q_weight, k_weight, cos, sin, inverse):
    gradients = _like_backward(d_q, d_k, d_v, qkv, q_weight, k_weight, cos, sin, inverse)
    d_qkv, d_q_weight, d_k_weight = gradients
    (b, t, _), heads = qkv.shape, inverse.shape[3]
    head_dim = qkv.shape[2] // (3 * heads)
    d_q, d_k, d_v = (layout.gradient(d, (b, heads, t, head_dim), qkv) for d in (d_q, d_k, d_v))
    qkv = layout.dense(qkv)
    q_weight, k_weight, cos, sin = (layout.floats(x) for x in (q_weight, k_weight, cos, sin))
    native.run(
        "qk_norm_rope_backward",
        *(b, t, heads, head_dim, 0.0),
        *native.rows(qkv),
        *map(native.address, (q_weight, k_weight, cos, sin, inverse)),
        *native.heads(d_q),
        *native.heads(d_k),
        *native.heads(d_v),
        *native.rows(d_qkv),
        d_q_weight.data_ptr(),
        d_k_weight.data_ptr(),
    )
    return gradients


_fused = FusedOp(
    "qk_norm_rope",
    inputs="Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, SymInt heads, float eps",
    outputs="Tensor, Tensor, Tensor, Tensor",
    results=3,
    like_forward=_like_forward,
    backward_inputs="Tensor? d_q, Tensor? d_k, Tensor? d_v, Tensor qkv, Tensor? q_weight, Tensor? k_weight, "
    "Tensor cos, Tensor sin, Tensor inverse",
    backward_outputs="Tensor, Tensor, Tensor",
    like_backward=_like_backward,
    saved=lambda inputs, outputs: (*inputs[:5], outputs[3]),
    bodies={
        "native": Body(_native_forward, _native_backward, _native_eager_forward),
        "triton": triton_body("qk_norm_rope", "qk_norm_rope"),
    },
)


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
    check("qk_norm_rope", qkv, heads, q_weight, k_weight, cos, sin)
    body = backend.choose(qkv)
    if body == "reference":
        return qk_norm_rope_ref(qkv, heads, q_weight, k_weight, cos, sin, eps)
    return _fused(body, qkv, q_weight, k_weight, cos, sin, heads, eps)


def check(op: str, qkv, heads, q_weight, k_weight, cos, sin) -> None:
    if qkv.dim() != 3:
        raise mistake(op, f"qkv must be [B, T, 3 * heads * head_dim], got {list(qkv.shape)}")
    t, packed = qkv.shape[1:]
    if packed % (6 * heads):
        raise mistake(op, f"width {packed} is not 3 x {heads} heads of even size")
    head_dim = packed // (3 * heads)
    if (q_weight is None) != (k_weight is None):
        raise mistake(op, "q_weight and k_weight must both be given or both be None")
    if q_weight is not None and not q_weight.shape == k_weight.shape == (head_dim,):
        raise mistake(op, f"q_weight and k_weight must be [{head_dim}]")
    if not cos.shape == sin.shape == (t, head_dim // 2):
        raise mistake(op, f"cos and sin must be [{t}, {head_dim // 2}]")
    if cos.requires_grad or sin.requires_grad:
        raise mistake(op, "cos and sin get no gradient; detach them")
