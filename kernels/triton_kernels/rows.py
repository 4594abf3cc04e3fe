"""Loads that the kernels share, sizes of launches, and those of kernels that process rows [D] one after another."""

import triton
import triton.language as tl

TOKENS = 16
"""Rows per program. Partial sums then cost half a byte per element, written and read."""
LANES_EACH = 8
"""Elements of a row per thread: one access of 16 bytes in bfloat16, two in float32."""


@triton.jit
def load(p, o, m):
    """p[o] in float32, 0 where m is False."""
    return tl.load(p + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def load_row(vector, D: tl.constexpr, BD: tl.constexpr):
    """A vector [D] as [1, BD], or None."""
    if vector is None:
        return None
    o_d = tl.arange(0, BD)
    return tl.load(vector + o_d, mask=o_d < D, other=0.0)[None, :]


def row_sizes(d: int) -> dict[str, int]:
    """Constants of a kernel whose programs process TOKENS rows [D]. Masked lanes pad a row to a power of two."""
    lanes = next_power_of_2(d)
    return {"D": d, "BD": lanes, "TOKENS": TOKENS, "num_warps": min(max(lanes // (32 * LANES_EACH), 1), 16)}


def cdiv(n: int, size: int) -> int:
    """ceil(n / size). triton.cdiv and triton.next_power_of_2 take 5 us: they serve kernels as well."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
