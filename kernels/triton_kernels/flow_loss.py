"""flow_loss on CUDA. A program processes a chunk of tokens of one draw of one image, [BT, BC] in registers; masked
lanes pad the channels to a power of two. float32 inside. Each program writes one partial sum of the loss, or of the
gradients of weight and bias; these are summed in a fixed order."""

import torch
import triton
import triton.language as tl

from unite_fast.kernels import tensors
from unite_fast.kernels.triton_kernels.rows import cdiv, load, load_row, next_power_of_2

ELEMENTS = 2048
"""Elements per tile: 16 per thread of 4 warps. With 32 channels that is 64 tokens, a quarter of a sample of 256."""


@triton.jit
def _place(lengths, samples, N, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """A program's sample, the number of its tokens that count, the program's tokens, their offsets in [N, C], and the
    mask of those that count."""
    i_sample = tl.program_id(0).to(tl.int64)
    o_t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    o_c = tl.arange(0, BC)
    n_t = N
    if lengths is not None:
        n_t = tl.minimum(tl.load(lengths + i_sample % samples), N).to(tl.int32)
    return i_sample, n_t, o_t, o_t[:, None] * C + o_c[None, :], (o_t < n_t)[:, None] & (o_c < C)[None, :]


@triton.jit
def _flow_loss_fwd_kernel(
    y,
    weight,
    bias,
    z,
    t,
    lengths,
    partial,
    share,
    mean,
    rstd,
    samples,
    N,
    min_time_left,
    eps,
    C: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    i_sample, n_t, o_t, o, m = _place(lengths, samples, N, C, BT, BC)
    b_y = load(y + i_sample * N * C, o, m)
    b_z = load(z + i_sample % samples * N * C, o, m)
    b_mean = tl.sum(b_y, axis=1) / C  # [BT]
    b_n = tl.where(m, b_y - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_n * b_n, axis=1) / C + eps)
    b_error = b_z - (b_n * b_rstd[:, None] * load_row(weight, C, BC) + load_row(bias, C, BC))
    b_error = tl.where(m, b_error, 0.0)
    time_left = 1.0 - tl.load(t + i_sample)
    # Not maximum(), which would drop a NaN.
    time_left = tl.where(time_left < min_time_left, min_time_left, time_left)
    b_share = 1.0 / (time_left * time_left * (n_t * C))
    tl.store(mean + i_sample * N + o_t, b_mean, mask=o_t < N)
    tl.store(rstd + i_sample * N + o_t, b_rstd, mask=o_t < N)
    tl.store(share + i_sample, b_share, mask=tl.program_id(1) == 0)
    b_loss = b_share * tl.sum(tl.sum(b_error * b_error, axis=1), axis=0)
    tl.store(partial + i_sample * tl.num_programs(1) + tl.program_id(1), b_loss)


@triton.jit
def _flow_loss_bwd_kernel(
    d_loss,
    y,
    weight,
    bias,
    z,
    lengths,
    share,
    mean,
    rstd,
    d_y,
    partial_weight,
    partial_bias,
    samples,
    N,
    C: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    i_sample, n_t, o_t, o, m = _place(lengths, samples, N, C, BT, BC)
    m_t, o_c, m_d_y = o_t < n_t, tl.arange(0, BC), m
    b_y = load(y + i_sample * N * C, o, m)
    b_z = load(z + i_sample % samples * N * C, o, m)
    b_mean = tl.load(mean + i_sample * N + o_t, mask=m_t, other=0.0)[:, None]
    b_rstd = tl.load(rstd + i_sample * N + o_t, mask=m_t, other=0.0)[:, None]
    b_weight = load_row(weight, C, BC)
    b_n = tl.where(m, (b_y - b_mean) * b_rstd, 0.0)
    b_error = tl.where(m, b_n * b_weight + load_row(bias, C, BC) - b_z, 0.0)
    b_d = 2.0 * tl.load(d_loss + i_sample) * tl.load(share + i_sample) * b_error  # gradient of the prediction
    # With a the gradient of n, the gradient of y is (a - mean(a) - n mean(a n)) rstd.
    b_a = b_d * b_weight
    b_mean_a = tl.sum(b_a, axis=1)[:, None] / C
    b_mean_an = tl.sum(b_a * b_n, axis=1)[:, None] / C
    b_d_y = b_rstd * (b_a - b_mean_a - b_n * b_mean_an)
    if lengths is not None:
        b_d_y = tl.where(m, b_d_y, 0.0)
        m_d_y = (o_t < N)[:, None] & (o_c < C)[None, :]
    tl.store(d_y + i_sample * N * C + o, b_d_y.to(d_y.dtype.element_ty), mask=m_d_y)
    o_partial = (i_sample * tl.num_programs(1) + tl.program_id(1)) * C + o_c
    tl.store(partial_weight + o_partial, tl.sum(b_d * b_n, axis=0), mask=o_c < C)
    tl.store(partial_bias + o_partial, tl.sum(b_d, axis=0), mask=o_c < C)


def flow_loss_forward(y, weight, bias, z, t, min_time_left, eps, lengths):
    """y [F, B, N, C], weight and bias [C], z [B, N, C], t [F, B], lengths [B] or None -> float32: loss [F, B], the
    weight of a squared error in it [F, B], mean and rstd of y's tokens [F, B, N]."""
    sizes, (programs, chunks) = _sizes(y), _grid(y)
    share = y.new_empty(t.shape, dtype=torch.float32)
    partial = y.new_empty((*t.shape, chunks), dtype=torch.float32)
    mean, rstd = (y.new_empty(y.shape[:3], dtype=torch.float32) for _ in range(2))
    if programs:
        inputs = (
            y.contiguous(),
            *map(tensors.as_float32, (weight, bias)),
            tensors.as_supported(z).contiguous(),
            tensors.as_float32(t),
            None if lengths is None else lengths.contiguous(),
        )
        outputs = partial, share, mean, rstd
        _flow_loss_fwd_kernel[(programs, chunks)](*inputs, *outputs, *y.shape[1:3], min_time_left, eps, **sizes)
    return partial.sum(-1), share, mean, rstd


def flow_loss_backward(d_loss, y, weight, bias, z, share, mean, rstd, lengths):
    """d_loss [F, B] and what was saved -> d_y in y's dtype, d_weight and d_bias [C] float32."""
    sizes, (programs, chunks) = _sizes(y), _grid(y)
    d_y = tensors.empty_like(y)
    partial_weight, partial_bias = (y.new_empty((programs * chunks, sizes["C"]), dtype=torch.float32) for _ in range(2))
    if programs:
        inputs = y.contiguous(), *map(tensors.as_float32, (weight, bias)), tensors.as_supported(z).contiguous()
        lengths = None if lengths is None else lengths.contiguous()
        outputs = d_y, partial_weight, partial_bias
        _flow_loss_bwd_kernel[(programs, chunks)](
            tensors.as_float32(d_loss), *inputs, lengths, share, mean, rstd, *outputs, *y.shape[1:3], **sizes
        )
    return d_y, partial_weight.sum(0), partial_bias.sum(0)


def _sizes(y) -> dict[str, int]:
    lanes = next_power_of_2(y.shape[3])
    return {"C": y.shape[3], "BT": max(1, ELEMENTS // lanes), "BC": lanes}


def _grid(y) -> tuple[int, int]:
    """Number of samples, and of chunks of tokens per sample."""
    draws, samples, tokens, _ = y.shape
    return draws * samples, cdiv(tokens, _sizes(y)["BT"])
