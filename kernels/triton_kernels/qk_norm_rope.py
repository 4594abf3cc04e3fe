"""qk_norm_rope on CUDA: per-head RMSNorm and rotation of q and k, from packed qkv to [B, H, T, K] stored as
[B, T, H, K]; v stays a view of qkv. The backward kernel is also that of split_heads.

A program is one warp, and never waits for another. In the forward pass it processes a few tokens of one sample, one
head after another, with their cos and sin in registers. In the backward pass it processes `TOKENS` tokens of one head,
a few at a time, with the sums over them in registers: one partial sum of the gradient of each weight and of the bias
that qkv contains. These are summed in a fixed order. Masked lanes pad the head dimension to a power of two. float32
inside.
"""

import torch
import triton
import triton.language as tl

from unite_fast.kernels import tensors
from unite_fast.kernels.triton_kernels.rows import cdiv, load, load_row, next_power_of_2
from unite_fast.kernels.triton_kernels.sums import sum_rows

ELEMENTS = 256
"""Elements of a tile [tokens, head dimension]: 8 per thread, one access of 16 bytes in bfloat16."""
TOKENS = 64
"""Tokens of a program of the backward kernel: the partial sums of the bias then cost an eighth of a byte per element,
written and read."""


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
    chunks = tl.cdiv(T, BT)
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    o_t = (tl.program_id(0) % chunks).to(tl.int64) * BT + tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    m_t = o_t < T
    m = m_t[:, None] & (o_k < K)[None, :]
    b_cos, b_sin = _angles(cos, sin, o_t, T, BT, K, BK)
    b_q_weight, b_k_weight = None, None
    if q_weight is not None:
        b_q_weight, b_k_weight = load_row(q_weight, K, BK), load_row(k_weight, K, BK)
    p_x = qkv + (i_b * stride_b + o_t[:, None] * stride_t) * UNIT + o_k[None, :]
    for i_h in range(H):
        b_q = load(p_x, i_h * K, m)
        b_k = load(p_x, (H + i_h) * K, m)
        o_out = ((i_b * T + o_t) * H + i_h)[:, None] * K + o_k[None, :]
        p_rstd = rstd + (i_b * T + o_t) * (2 * H) + i_h
        b_q = _norm_rotate(b_q, b_q_weight, p_rstd, b_cos, b_sin, m_t, eps, K, BT, BK)
        b_k = _norm_rotate(b_k, b_k_weight, p_rstd + H, b_cos, b_sin, m_t, eps, K, BT, BK)
        tl.store(q + o_out, b_q.to(q.dtype.element_ty), mask=m)
        tl.store(k + o_out, b_k.to(k.dtype.element_ty), mask=m)


@triton.jit
def _back(b_g, p_x, b_weight, rstd, o_rstd, b_cos, b_sin, m, m_t, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """Gradient of x, and of the weight per token if there is one, from b_g, the gradient of the result.

    With n = x / rms(x) and its gradient a = (b_g rotated back) * weight, the gradient of x is
    (a - n mean(a n)) / rms(x). Without angles there is neither rotation nor norm.
    """
    b_a = b_g.to(tl.float32)
    if b_cos is not None:
        b_a = _rotate(b_a, b_cos, -b_sin, BT, BK)
    b_d_weight = b_a
    if b_weight is not None:
        b_r = tl.load(rstd + o_rstd, mask=m_t, other=0.0)[:, None]
        b_n = tl.load(p_x, mask=m, other=0.0).to(tl.float32) * b_r
        b_d_weight = b_a * b_n
        b_mean = tl.sum(b_d_weight * b_weight, axis=1) / K
        b_a = b_r * (b_a * b_weight - b_n * b_mean[:, None])
    return b_a, b_d_weight


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
    TOKENS: tl.constexpr,
    BIAS: tl.constexpr,
):
    # Neighbouring programs take the heads of the same tokens, which are neighbours in memory.
    i_h = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(T, TOKENS)
    i_b, i_first = (tl.program_id(1) // chunks).to(tl.int64), tl.program_id(1) % chunks * TOKENS
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    b_q_weight, b_k_weight = None, None
    if q_weight is not None:
        b_q_weight, b_k_weight = load_row(q_weight, K, BK), load_row(k_weight, K, BK)
    b_d_q_weight, b_d_k_weight = tl.zeros((BT, BK), tl.float32), tl.zeros((BT, BK), tl.float32)
    b_sum_q, b_sum_k = tl.zeros((BT, BK), tl.float32), tl.zeros((BT, BK), tl.float32)
    b_sum_v = tl.zeros((BT, BK), tl.float32)
    p_d_q = d_q + (i_b * d_q_stride_b + i_h * d_q_stride_h) * UNIT + o_k[None, :]
    p_d_k = d_k + (i_b * d_k_stride_b + i_h * d_k_stride_h) * UNIT + o_k[None, :]
    p_d_v = d_v + (i_b * d_v_stride_b + i_h * d_v_stride_h) * UNIT + o_k[None, :]
    p_x = qkv + i_b * stride_b * UNIT + i_h * K + o_k[None, :]
    p_d_x = d_qkv + i_b * T * (3 * H * K) + i_h * K + o_k[None, :]
    for i_t in range(i_first, tl.minimum(i_first + TOKENS, T), BT):
        o_t = (i_t + tl.arange(0, BT)).to(tl.int64)
        m_t = o_t < T
        m = m_t[:, None] & m_k[None, :]
        b_d_q = tl.load(p_d_q + o_t[:, None] * d_q_stride_t * UNIT, mask=m, other=0.0)
        b_d_k = tl.load(p_d_k + o_t[:, None] * d_k_stride_t * UNIT, mask=m, other=0.0)
        b_d_v = tl.load(p_d_v + o_t[:, None] * d_v_stride_t * UNIT, mask=m, other=0.0)
        b_cos, b_sin = None, None
        if cos is not None:
            b_cos, b_sin = _angles(cos, sin, o_t, T, BT, K, BK)
        o_rstd = (i_b * T + o_t) * (2 * H) + i_h
        p_q = p_x + o_t[:, None] * stride_t * UNIT
        p_k, o_k_rstd = p_q + H * K, o_rstd + H
        b_d_q, b_each_q = _back(b_d_q, p_q, b_q_weight, rstd, o_rstd, b_cos, b_sin, m, m_t, K, BT, BK)
        b_d_k, b_each_k = _back(b_d_k, p_k, b_k_weight, rstd, o_k_rstd, b_cos, b_sin, m, m_t, K, BT, BK)
        if q_weight is not None:
            b_d_q_weight += b_each_q
            b_d_k_weight += b_each_k
        p_d_q_out = p_d_x + o_t[:, None] * (3 * H * K)
        tl.store(p_d_q_out, b_d_q.to(d_qkv.dtype.element_ty), mask=m)
        tl.store(p_d_q_out + H * K, b_d_k.to(d_qkv.dtype.element_ty), mask=m)
        tl.store(p_d_q_out + 2 * H * K, b_d_v.to(d_qkv.dtype.element_ty), mask=m)
        if BIAS:
            b_sum_q += b_d_q
            b_sum_k += b_d_k
            b_sum_v += b_d_v.to(tl.float32)
    # One row per program of a head: the sums of the bias [3, H, K], then those of the weights [2, H, K].
    width = 0
    if BIAS:
        width += 3
    if q_weight is not None:
        width += 2
    p_partial = partial + tl.program_id(1).to(tl.int64) * (width * H * K) + i_h * K + o_k
    if BIAS:
        tl.store(p_partial, tl.sum(b_sum_q, axis=0), mask=m_k)
        tl.store(p_partial + H * K, tl.sum(b_sum_k, axis=0), mask=m_k)
        tl.store(p_partial + 2 * H * K, tl.sum(b_sum_v, axis=0), mask=m_k)
        p_partial += 3 * H * K
    if q_weight is not None:
        tl.store(p_partial, tl.sum(b_d_q_weight, axis=0), mask=m_k)
        tl.store(p_partial + H * K, tl.sum(b_d_k_weight, axis=0), mask=m_k)


def qk_norm_rope_forward(qkv, q_weight, k_weight, qkv_bias, cos, sin, heads, eps):
    """qkv [B, T, 3 H K], weights [K] or None, cos and sin [T, K / 2] -> q and k [B, H, T, K] in qkv's dtype, and the
    rstd [B, T, 2, H] float32, uninitialised without weights."""
    b, t, packed = qkv.shape
    sizes = _sizes(heads, packed // (3 * heads))
    q, k = (qkv.new_empty((b, t, heads, sizes["K"])).transpose(1, 2) for _ in range(2))
    rstd = qkv.new_empty((b, t, 2, heads), dtype=torch.float32)
    if q.numel():
        qkv = tensors.dense(qkv)
        unit, strides = tensors.in_units(qkv.stride()[:2])
        weights_and_angles = map(tensors.as_float32, (q_weight, k_weight, cos, sin))
        grid = (b * cdiv(t, sizes["BT"]),)
        _qk_norm_rope_fwd_kernel[grid](
            qkv, *weights_and_angles, q, k, rstd, *strides, t, eps, **sizes, UNIT=unit, num_warps=1
        )
    return q, k, rstd


def qk_norm_rope_backward(d_q, d_k, d_v, qkv, q_weight, k_weight, cos, sin, rstd, bias_gradient):
    """Gradients of the results, [B, H, T, K] or None, and what was saved -> d_qkv in qkv's dtype, d_q_weight and
    d_k_weight [K] float32, empty without weights, and the sum of d_qkv [3 H K] float32, empty unless `bias_gradient`.
    """
    heads = rstd.shape[3]
    d_qkv, sums = _backward((d_q, d_k, d_v), qkv, q_weight, k_weight, cos, sin, rstd, heads, bias_gradient)
    d_bias, d_weights = sums.split((qkv.shape[2] if bias_gradient else 0, sums.numel() - qkv.shape[2] * bias_gradient))
    if q_weight is None:
        return d_qkv, *(qkv.new_empty(0, dtype=torch.float32) for _ in range(2)), d_bias
    return d_qkv, *d_weights.view(2, heads, -1).sum(1), d_bias


def split_heads_backward(d_q, d_k, d_v, qkv, heads, bias_gradient):
    """Gradients of the results, [B, H, T, K] or None -> d_qkv like qkv, and its sum as above."""
    return _backward((d_q, d_k, d_v), qkv, None, None, None, None, None, heads, bias_gradient)


def _backward(incoming, qkv, q_weight, k_weight, cos, sin, rstd, heads, bias_gradient):
    """-> d_qkv, and one tensor with the sums over all tokens: d_bias [3, H, K], then each head's part of d_q_weight and
    d_k_weight [2, H, K], as far as wanted."""
    b, t, packed = qkv.shape
    sizes, d_qkv = _sizes(heads, packed // (3 * heads)), tensors.empty_like(qkv)
    grid = heads, b * cdiv(t, TOKENS)
    parts = 3 * bias_gradient + 2 * (q_weight is not None)
    partial = qkv.new_empty((1, grid[1], parts * packed // 3), dtype=torch.float32)
    if d_qkv.numel():
        incoming = [tensors.gradient_or_zeros(d, (b, heads, t, sizes["K"]), qkv) for d in incoming]
        qkv = tensors.dense(qkv)
        unit, strides = tensors.in_units([*(s for d in incoming for s in d.stride()[:3]), *qkv.stride()[:2]])
        weights_and_angles = map(tensors.as_float32, (q_weight, k_weight, cos, sin))
        pointers = *incoming, qkv, *weights_and_angles, rstd, d_qkv, partial
        constants = sizes | {"UNIT": unit, "TOKENS": TOKENS, "BIAS": bias_gradient}
        _qk_norm_rope_bwd_kernel[grid](*pointers, *strides, t, **constants, num_warps=1)
    return d_qkv, sum_rows(partial)[0]


def _sizes(heads: int, head_dim: int) -> dict[str, int]:
    lanes = next_power_of_2(head_dim)
    return {"H": heads, "K": head_dim, "BT": max(1, ELEMENTS // lanes), "BK": lanes}
