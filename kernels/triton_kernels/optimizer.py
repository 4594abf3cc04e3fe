"""The optimizer step on CUDA: one launch walks the chunks of all tensors.

A table on the device, int64 [rows, tensors], says where the tensors are: for each, the number of chunks up to its end
(row 0), its number of elements (row 1), then addresses and numbers of the kernel's own. A program finds its tensor by
its chunk's number. All tensors are contiguous and float32; directions and updates of Muon may be bfloat16.

Arithmetic is float32, in the order of the foreach operators that run on other devices (unite_fast/optim). Shares of
averages are passed as 1 - decay, because float32 keeps more digits of that than of decay.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from unite_fast.kernels.triton_kernels.rows import next_power_of_2

CHUNK = 16384
"""Elements of a program: long enough to hide how it finds its tensor."""
BLOCK = 1024
"""Elements in flight: 8 per thread of 4 warps."""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit
def _find(table, N: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr):
    """This program's tensor, its chunk's first element, and the tensor's size."""
    o = tl.arange(0, LANES)
    b_end = tl.load(table + o, mask=o < N, other=2**31)
    b_before = b_end <= tl.program_id(0)
    i = tl.sum(b_before.to(tl.int32), axis=0)
    start = (tl.program_id(0) - tl.max(tl.where(b_before, b_end, 0), axis=0)) * CHUNK
    size = tl.load(table + N + i)
    if ALIGNED:
        # Else Triton masks, and so loads, each element by itself.
        size = tl.multiple_of(size, 8)
    return i, start, size


@triton.jit
def _pointer(table, row, i, N: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Tensor i of a row of addresses."""
    pointer = tl.load(table + row * N + i).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _number(table, row, i, N: tl.constexpr):
    """The float32 number of tensor i, whose bits are in the table."""
    return tl.load(table + row * N + i).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _clip_factor(norm, clip_norm):
    return tl.minimum(clip_norm / (tl.load(norm) + 1e-6), 1.0)


@triton.jit
def _lerp(b_from, b_to, weight):
    """torch.lerp, which starts from the nearer end."""
    b_difference = b_to - b_from
    return tl.where(weight < 0.5, b_from + weight * b_difference, b_to - b_difference * (1.0 - weight))


@triton.jit
def _gradient_squares_kernel(
    table,
    partial,
    N: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    i, start, size = _find(table, N, LANES, CHUNK, ALIGNED)
    g = _pointer(table, 2, i, N, tl.float32, ALIGNED)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i_block in range(0, tl.minimum(size - start, CHUNK), BLOCK):
        o = start + i_block + tl.arange(0, BLOCK)
        b_g = tl.load(g + o, mask=o < size, other=0.0)
        b_sum += b_g * b_g
    tl.store(partial + tl.program_id(0), tl.sum(b_sum, axis=0))


@triton.jit
def _gradient_norm_kernel(partial, norm, count, BLOCK: tl.constexpr):
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i_block in range(0, count, BLOCK):
        o = i_block + tl.arange(0, BLOCK)
        b_sum += tl.load(partial + o, mask=o < count, other=0.0)
    tl.store(norm, tl.sqrt_rn(tl.sum(b_sum, axis=0)))


@triton.jit
def _muon_momentum_kernel(
    table,
    norm,
    found_inf,
    clip_norm,
    momentum,
    share,
    N: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    TYPE: tl.constexpr,
):
    i, start, size = _find(table, N, LANES, CHUNK, ALIGNED)
    if found_inf is not None:
        size = tl.where(tl.load(found_inf) != 0, 0, size)
    factor = _clip_factor(norm, clip_norm)
    g = _pointer(table, 2, i, N, tl.float32, ALIGNED)
    m = _pointer(table, 3, i, N, tl.float32, ALIGNED)
    direction = _pointer(table, 4, i, N, TYPE, ALIGNED)
    # Other ranks compute some updates; then no direction is wanted here.
    wanted = tl.load(table + 4 * N + i) != 0
    for i_block in range(0, tl.minimum(size - start, CHUNK), BLOCK):
        o = start + i_block + tl.arange(0, BLOCK)
        m_o = o < size
        b_g = tl.load(g + o, mask=m_o, other=0.0) * factor
        b_m = _lerp(tl.load(m + o, mask=m_o, other=0.0), b_g, share)
        tl.store(m + o, b_m, mask=m_o)
        if wanted:
            tl.store(direction + o, _lerp(b_g, b_m, momentum).to(TYPE), mask=m_o)


@triton.jit
def _muon_update_kernel(
    table,
    found_inf,
    share,
    N: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    TYPE: tl.constexpr,
):
    i, start, size = _find(table, N, LANES, CHUNK, ALIGNED)
    if found_inf is not None:
        size = tl.where(tl.load(found_inf) != 0, 0, size)
    w = _pointer(table, 2, i, N, tl.float32, ALIGNED)
    average = _pointer(table, 3, i, N, tl.float32, ALIGNED)
    update = _pointer(table, 4, i, N, TYPE, ALIGNED)
    rate = _number(table, 5, i, N)
    for i_block in range(0, tl.minimum(size - start, CHUNK), BLOCK):
        o = start + i_block + tl.arange(0, BLOCK)
        m_o = o < size
        b_w = tl.load(w + o, mask=m_o, other=0.0)
        b_w -= rate * tl.load(update + o, mask=m_o, other=0.0).to(tl.float32)
        tl.store(w + o, b_w, mask=m_o)
        b_average = tl.load(average + o, mask=m_o, other=0.0)
        tl.store(average + o, _lerp(b_average, b_w, share), mask=m_o)


@triton.jit
def _adamw_steps_kernel(
    table,
    corrections,
    found_inf,
    N: tl.constexpr,
    LANES: tl.constexpr,
    LOG_BETA_1: tl.constexpr,
    LOG_BETA_2: tl.constexpr,
):
    o = tl.arange(0, LANES)
    m_o = o < N
    p_step = tl.load(table + 7 * N + o, mask=m_o, other=0).to(tl.pointer_type(tl.float32))
    b_step = tl.load(p_step, mask=m_o, other=0.0) + 1.0
    # float64: 1 - beta^step has lost digits in float32 while step is small.
    b_first = 1.0 - tl.exp(b_step.to(tl.float64) * LOG_BETA_1)
    b_second = tl.sqrt(1.0 - tl.exp(b_step.to(tl.float64) * LOG_BETA_2))
    tl.store(corrections + o, b_first.to(tl.float32), mask=m_o)
    tl.store(corrections + N + o, b_second.to(tl.float32), mask=m_o)
    if found_inf is not None:
        b_step = tl.where(tl.load(found_inf) != 0, b_step - 1.0, b_step)
    tl.store(p_step, b_step, mask=m_o)


@triton.jit
def _adamw_update_kernel(
    table,
    corrections,
    norm,
    found_inf,
    clip_norm,
    lr,
    share_1,
    share_2,
    eps,
    share,
    N: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    i, start, size = _find(table, N, LANES, CHUNK, ALIGNED)
    if found_inf is not None:
        size = tl.where(tl.load(found_inf) != 0, 0, size)
    factor = _clip_factor(norm, clip_norm)
    rate = lr / tl.load(corrections + i)
    correction = tl.load(corrections + N + i)
    g = _pointer(table, 2, i, N, tl.float32, ALIGNED)
    w = _pointer(table, 3, i, N, tl.float32, ALIGNED)
    average = _pointer(table, 4, i, N, tl.float32, ALIGNED)
    m = _pointer(table, 5, i, N, tl.float32, ALIGNED)
    v = _pointer(table, 6, i, N, tl.float32, ALIGNED)
    for i_block in range(0, tl.minimum(size - start, CHUNK), BLOCK):
        o = start + i_block + tl.arange(0, BLOCK)
        m_o = o < size
        b_g = tl.load(g + o, mask=m_o, other=0.0) * factor
        b_m = _lerp(tl.load(m + o, mask=m_o, other=0.0), b_g, share_1)
        b_v = _lerp(tl.load(v + o, mask=m_o, other=0.0), b_g * b_g, share_2)
        b_w = tl.load(w + o, mask=m_o, other=0.0) - rate * b_m / (tl.sqrt(b_v) / correction + eps)
        b_average = tl.load(average + o, mask=m_o, other=0.0)
        tl.store(m + o, b_m, mask=m_o)
        tl.store(v + o, b_v, mask=m_o)
        tl.store(w + o, b_w, mask=m_o)
        tl.store(average + o, _lerp(b_average, b_w, share), mask=m_o)


def gradient_norm(gradients: Sequence[Tensor]) -> tuple[Tensor]:
    """sqrt(sum of squares) of all gradients -> (float32 scalar,). The order of the sums depends on the sizes alone."""
    norm = gradients[0].new_empty(())
    table, programs, sizes = table_of(gradients)
    partial = norm.new_empty(programs)
    if programs:
        _gradient_squares_kernel[programs,](table, partial, **sizes)
    _gradient_norm_kernel[1,](partial, norm, programs, BLOCK=BLOCK)
    return (norm,)


def muon_momentum(
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    directions: Sequence[Tensor | None],
    norm: Tensor,
    clip_norm: float,
    momentum: float,
    found_inf: Tensor | None,
) -> None:
    """g = gradient * min(clip_norm / (norm + 1e-6), 1), m <- lerp(m, g, 1 - momentum), and where a direction is wanted,
    direction = lerp(g, m, momentum), rounded to its dtype. If found_inf is 1, nothing is written."""
    table, programs, sizes = table_of(gradients, momenta, directions)
    dtype = next((d.dtype for d in directions if d is not None), torch.float32)
    if programs:
        _muon_momentum_kernel[programs,](
            table, norm, found_inf, clip_norm, momentum, 1 - momentum, **sizes, TYPE=TYPES[dtype]
        )


def muon_update(
    weights: Sequence[Tensor],
    averages: Sequence[Tensor],
    updates: Sequence[Tensor],
    rates: Sequence[float],
    decay: float,
    found_inf: Tensor | None,
) -> None:
    """w <- w - rate * update, average <- lerp(average, w, 1 - decay). If found_inf is 1, nothing is written."""
    table, programs, sizes = table_of(weights, averages, updates, numbers=rates)
    if programs:
        _muon_update_kernel[programs,](table, found_inf, 1 - decay, **sizes, TYPE=TYPES[updates[0].dtype])


def adamw_update(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    averages: Sequence[Tensor],
    moments: tuple[Sequence[Tensor], Sequence[Tensor]],
    steps: Sequence[Tensor],
    norm: Tensor,
    clip_norm: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    found_inf: Tensor | None,
) -> None:
    """A step of AdamW without weight decay (Loshchilov and Hutter, arXiv 1711.05101) and of the averages, with clipped
    gradients as in `muon_momentum`. `steps` are float32 scalars. If found_inf is 1, nothing is written."""
    table, programs, sizes = table_of(gradients, weights, averages, *moments, steps)
    corrections = table.new_empty((2, sizes["N"]), dtype=torch.float32)
    logarithms = (math.log(beta) if beta else -1e30 for beta in betas)
    _adamw_steps_kernel[1,](table, corrections, found_inf, sizes["N"], sizes["LANES"], *logarithms)
    if programs:
        _adamw_update_kernel[programs,](
            table,
            corrections,
            norm,
            found_inf,
            clip_norm,
            lr,
            *(1 - beta for beta in betas),
            eps,
            1 - decay,
            **sizes,
        )


def table_of(
    tensors: Sequence[Tensor], *others: Sequence[Tensor | None], numbers: Sequence[float] = ()
) -> tuple[Tensor, int, dict]:
    """The table on the tensors' device, the number of programs, and the kernels' constants.

    Args:
        others: further rows of tensors; None becomes address 0.
        numbers: a last row, of which the kernel reads the float32 bits.
    """
    counts = np.array([x.numel() for x in tensors])
    ends = np.cumsum(-(-counts // CHUNK))
    addresses = np.array([[0 if x is None else address(x) for x in row] for row in (tensors, *others)])
    bits = np.array(numbers, np.float32).view(np.int32).reshape(-1, len(counts))
    rows = np.concatenate([ends[None], counts[None], addresses, bits]).astype(np.int64)
    sizes = {
        "N": len(counts),
        "LANES": next_power_of_2(len(counts)),
        "CHUNK": CHUNK,
        "BLOCK": BLOCK,
        "ALIGNED": not (addresses % 16).any() and not (counts % 8).any(),
    }
    return upload(rows, tensors[0].device), int(ends[-1]), sizes


def upload(rows: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(rows)
    # From pinned memory, so that the host does not wait. PyTorch keeps that memory until the copy is done.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def address(x: Tensor) -> int:
    return x.data_ptr()
