"""qk_norm_rope on CUDA: per-head RMSNorm and rotation of q and k, and a copy of v, from packed qkv to [B, H, T, K]
stored as [B, T, H, K].

A program is one warp. It processes a few tokens of one sample, one head after another, with their cos and sin in
registers, and never waits for another warp. Masked lanes pad the head dimension to a power of two. float32 inside. Each
program writes one partial sum of a weight's gradient; these are summed in a fixed order.
"""

import torch
import triton
import triton.language as tl

from unite_fast.kernels import tensors
from unite_fast.kernels.triton_kernels.rows import cdiv, load, load_row, next_power_of_2

ELEMENTS = 256
"""Elements of a tile [tokens, head dimension]: 8 per thread, one access of 16 bytes in bfloat16."""


@triton.jit
def _place(T, BT: tl.constexpr):
    """A program's sample and tokens."""
    chunks = tl.cdiv(T, BT)
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    return i_b, (tl.program_id(0) % chunks).to(tl.int64) * BT + tl.arange(0, BT)


@triton.jit
def _angles(cos, sin, o_t, T, BT: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    o_half = tl.arange(0, BK // 2)
    m = (o_t < T)[:, None] & (o_half < K // 2)[None, :]
    o = o_t[:, None] * (K // 2) + o_half[None, :]
    return tl.load(cos + o, mask=m, other=0.0), tl.load(sin + o, mask=m, other=0.0)


@triton.jit
def _rotate(b_x, b_cos, b_sin, BT: tl.constexpr, BK: tl.constexpr):
    """Rotate each pair of neighbours by its angle; both are in the same thread."""
    b_even, b_odd = tl.split(tl.reshape(b_x, (BT, BK // 2, 2)))
    b_pairs = tl.join(b_even * b_cos - b_odd * b_sin, b_odd * b_cos + b_even * b_sin)
    return tl.reshape(b_pairs, (BT, BK))


@triton.jit
def _norm_rotate(b_x, b_weight, p_rstd, b_cos, b_sin, m_t, eps, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    if b_weight is not None:
        b_r = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / K + eps)
        tl.store(p_rstd, b_r, mask=m_t)
        b_x = b_x * b_r[:, None] * b_weight
    return _rotate(b_x, b_cos, b_sin, BT, BK)


@triton.jit
def _qk_norm_rope_fwd_kernel(
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    q,
    k,
    v,
    rstd,
    stride_b,
    stride_t,
    T,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    UNIT: tl.constexpr,
):
    i_b, o_t = _place(T, BT)
    o_k = tl.arange(0, BK)
    m_t = o_t < T
    m = m_t[:, None] & (o_k < K)[None, :]
    b_cos, b_sin = _angles(cos, sin, o_t, T, BT, K, BK)
    b_q_weight, b_k_weight = load_row(q_weight, K, BK), load_row(k_weight, K, BK)
    p_x = qkv + (i_b * stride_b + o_t[:, None] * stride_t) * UNIT + o_k[None, :]
    for i_h in range(H):
        b_q = load(p_x, i_h * K, m)
        b_k = load(p_x, (H + i_h) * K, m)
        b_v = tl.load(p_x + (2 * H + i_h) * K, mask=m, other=0.0)
        o_out = ((i_b * T + o_t) * H + i_h)[:, None] * K + o_k[None, :]
        p_rstd = rstd + (i_b * T + o_t) * (2 * H) + i_h
        b_q = _norm_rotate(b_q, b_q_weight, p_rstd, b_cos, b_sin, m_t, eps, K, BT, BK)
        b_k = _norm_rotate(b_k, b_k_weight, p_rstd + H, b_cos, b_sin, m_t, eps, K, BT, BK)
        tl.store(q + o_out, b_q.to(q.dtype.element_ty), mask=m)
        tl.store(k + o_out, b_k.to(k.dtype.element_ty), mask=m)
        tl.store(v + o_out, b_v, mask=m)


@triton.jit
def _load_rstd(p_rstd, b_weight, m_t):
    return None if b_weight is None else tl.load(p_rstd, mask=m_t, other=0.0)[:, None]


@triton.jit
def _back(b_g, b_x, b_weight, b_r, b_cos, b_sin, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """Gradient of x, and of the weight per token, from b_g, the gradient of the result.

    With n = x / rms(x) and its gradient a = (b_g rotated back) * weight, the gradient of x is
    (a - n mean(a n)) / rms(x).
    """
    b_a = _rotate(b_g.to(tl.float32), b_cos, -b_sin, BT, BK)
    if b_weight is None:
        return b_a, 0.0
    b_n = b_x.to(tl.float32) * b_r
    b_d_weight = b_a * b_n
    b_mean = tl.sum(b_d_weight * b_weight, axis=1) / K
    return b_r * (b_a * b_weight - b_n * b_mean[:, None]), b_d_weight


@triton.jit
def _qk_norm_rope_bwd_kernel(
    d_q,
    d_k,
    d_v,
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    rstd,
    d_qkv,
    partial,
    d_q_stride_b,
    d_q_stride_h,
    d_q_stride_t,
    d_k_stride_b,
    d_k_stride_h,
    d_k_stride_t,
    d_v_stride_b,
    d_v_stride_h,
    d_v_stride_t,
    stride_b,
    stride_t,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    UNIT: tl.constexpr,
):
    i_b, o_t = _place(T, BT)
    o_k = tl.arange(0, BK)
    m_t = o_t < T
    m = m_t[:, None] & (o_k < K)[None, :]
    b_cos, b_sin = _angles(cos, sin, o_t, T, BT, K, BK)
    b_q_weight, b_k_weight = load_row(q_weight, K, BK), load_row(k_weight, K, BK)
    b_d_q_weight = tl.zeros((BT, BK), tl.float32)
    b_d_k_weight = tl.zeros((BT, BK), tl.float32)
    p_d_q = d_q + (i_b * d_q_stride_b + o_t[:, None] * d_q_stride_t) * UNIT + o_k[None, :]
    p_d_k = d_k + (i_b * d_k_stride_b + o_t[:, None] * d_k_stride_t) * UNIT + o_k[None, :]
    p_d_v = d_v + (i_b * d_v_stride_b + o_t[:, None] * d_v_stride_t) * UNIT + o_k[None, :]
    p_x = qkv + (i_b * stride_b + o_t[:, None] * stride_t) * UNIT + o_k[None, :]
    p_d_x = d_qkv + (i_b * T + o_t)[:, None] * (3 * H * K) + o_k[None, :]
    for i_h in range(H):
        b_d_q = tl.load(p_d_q + i_h * tl.cast(d_q_stride_h, tl.int64) * UNIT, mask=m, other=0.0)
        b_d_k = tl.load(p_d_k + i_h * tl.cast(d_k_stride_h, tl.int64) * UNIT, mask=m, other=0.0)
        b_d_v = tl.load(p_d_v + i_h * tl.cast(d_v_stride_h, tl.int64) * UNIT, mask=m, other=0.0)
        b_q = tl.load(p_x + i_h * K, mask=m, other=0.0)
        b_k = tl.load(p_x + (H + i_h) * K, mask=m, other=0.0)
        p_rstd = rstd + (i_b * T + o_t) * (2 * H) + i_h
        b_q_r, b_k_r = _load_rstd(p_rstd, b_q_weight, m_t), _load_rstd(p_rstd + H, b_k_weight, m_t)
        b_d_q, b_d_weight = _back(b_d_q, b_q, b_q_weight, b_q_r, b_cos, b_sin, K, BT, BK)
        b_d_q_weight += b_d_weight
        b_d_k, b_d_weight = _back(b_d_k, b_k, b_k_weight, b_k_r, b_cos, b_sin, K, BT, BK)
        b_d_k_weight += b_d_weight
        tl.store(p_d_x + i_h * K, b_d_q.to(d_qkv.dtype.element_ty), mask=m)
        tl.store(p_d_x + (H + i_h) * K, b_d_k.to(d_qkv.dtype.element_ty), mask=m)
        tl.store(p_d_x + (2 * H + i_h) * K, b_d_v.to(d_qkv.dtype.element_ty), mask=m)
    if q_weight is not None:
        p_partial = partial + tl.program_id(0).to(tl.int64) * K + o_k
        tl.store(p_partial, tl.sum(b_d_q_weight, axis=0), mask=o_k < K)
        p_partial += tl.num_programs(0).to(tl.int64) * K
        tl.store(p_partial, tl.sum(b_d_k_weight, axis=0), mask=o_k < K)


def qk_norm_rope_forward(qkv, q_weight, k_weight, cos, sin, heads, eps):
    """qkv [B, T, 3 H K], weights [K] or None, cos and sin [T, K / 2] -> q, k, v [B, H, T, K] in qkv's dtype and the
    rstd [B, T, 2, H] float32, uninitialised without weights."""
    b, t, packed = qkv.shape
    sizes = _sizes(heads, packed // (3 * heads))
    q, k, v = (qkv.new_empty((b, t, heads, sizes["K"])).transpose(1, 2) for _ in range(3))
    rstd = qkv.new_empty((b, t, 2, heads), dtype=torch.float32)
    if q.numel():
        qkv = tensors.dense(qkv)
        unit, strides = tensors.in_units(qkv.stride()[:2])
        weights_and_angles = map(tensors.as_float32, (q_weight, k_weight, cos, sin))
        results = q, k, v, rstd
        _qk_norm_rope_fwd_kernel[(_programs(b, t, sizes),)](
            qkv, *weights_and_angles, *results, *strides, t, eps, **sizes, UNIT=unit, num_warps=1
        )
    return q, k, v, rstd


def qk_norm_rope_backward(d_q, d_k, d_v, qkv, q_weight, k_weight, cos, sin, rstd):
    """Gradients of the results, [B, H, T, K] or None, and what was saved -> d_qkv in qkv's dtype, d_q_weight and
    d_k_weight [K] float32, empty without weights."""
    (b, t, packed), heads = qkv.shape, rstd.shape[3]
    sizes = _sizes(heads, packed // (3 * heads))
    d_qkv, programs = tensors.empty_like(qkv), _programs(b, t, sizes)
    partial = qkv.new_empty((2, programs, sizes["K"] if q_weight is not None else 0), dtype=torch.float32)
    if d_qkv.numel():
        incoming = [tensors.gradient_or_zeros(d, (b, heads, t, sizes["K"]), qkv) for d in (d_q, d_k, d_v)]
        qkv = tensors.dense(qkv)
        unit, strides = tensors.in_units([*(s for d in incoming for s in d.stride()[:3]), *qkv.stride()[:2]])
        weights_and_angles = map(tensors.as_float32, (q_weight, k_weight, cos, sin))
        _qk_norm_rope_bwd_kernel[(programs,)](
            *incoming, qkv, *weights_and_angles, rstd, d_qkv, partial, *strides, t, **sizes, UNIT=unit, num_warps=1
        )
    return d_qkv, *partial.sum(1)


def _sizes(heads: int, head_dim: int) -> dict[str, int]:
    lanes = next_power_of_2(head_dim)
    return {"H": heads, "K": head_dim, "BT": max(1, ELEMENTS // lanes), "BK": lanes}


def _programs(b: int, t: int, sizes: dict[str, int]) -> int:
    return b * cdiv(t, sizes["BT"])
