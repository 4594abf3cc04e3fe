"""Adds up the partial sums that a kernel's programs wrote: in a fixed order, in float32, one launch for up to three
tensors."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from unite_fast.kernels import tensors
from unite_fast.kernels.triton_kernels.rows import cdiv

ROWS, LANES = 64, 32
"""Size of a tile: 16 numbers per thread of 4 warps; a width of 768 gives two dozen programs per tensor."""


@triton.jit
def _sum_rows_kernel(partial, first, second, third, rows, D: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    i_sum = tl.program_id(1)
    o_d = tl.program_id(0) * LANES + tl.arange(0, LANES)
    m_d = o_d < D
    b_sum = tl.zeros((ROWS, LANES), tl.float32)
    p_partial = partial + i_sum.to(tl.int64) * rows * D
    for i_row in range(0, rows, ROWS):
        o_row = (i_row + tl.arange(0, ROWS)).to(tl.int64)
        m = (o_row < rows)[:, None] & m_d[None, :]
        b_sum += tl.load(p_partial + o_row[:, None] * D + o_d[None, :], mask=m, other=0.0)
    b_sum = tl.sum(b_sum, axis=0)
    if i_sum == 0:
        tl.store(first + o_d, b_sum, mask=m_d)
    elif second is not None and i_sum == 1:
        tl.store(second + o_d, b_sum, mask=m_d)
    elif third is not None and i_sum == 2:
        tl.store(third + o_d, b_sum, mask=m_d)


def sum_rows(partial: Tensor) -> list[Tensor]:
    """partial float32 [n, rows, D], n 1 to 3, at most some thousand rows -> n tensors [D] that share no memory."""
    sums, rows, d = partial.shape
    out = [partial.new_empty(d) for _ in range(sums)]
    if d:
        grid = cdiv(d, LANES), sums
        _sum_rows_kernel[grid](partial, *out, *[None] * (3 - sums), rows, D=d, ROWS=ROWS, LANES=LANES)
    return out


def bias_partial(x: Tensor, rows: int, wanted: bool) -> Tensor | None:
    """Uninitialised partial sums of the gradient of x [..., N], one row per program: [rows, N], or None."""
    return x.new_empty((rows, x.shape[-1]), dtype=torch.float32) if wanted else None


def sum_bias(partial: Tensor | None, x: Tensor) -> Tensor:
    """The sums of the rows of `bias_partial`, [N]: the gradient of the bias that x contains. Empty for None."""
    return tensors.empty_bias_gradient(x, False) if partial is None else sum_rows(partial[None])[0]
