"""Loads and sizes of launches that the kernels share."""

import functools

import torch
import triton
import triton.language as tl

PROCESSORS = {"meta": 132, "cpu": 1}
"""Multiprocessors where there is no GPU: an H100's to compile for one, and one in the interpreter, which runs one
program after another."""
START = 3
"""What a program costs beside its rows, in rows: it loads vectors and writes partial sums."""


@triton.jit
def load(p, o, m):
    """p[o] in float32, 0 where m is False."""
    return tl.load(p + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def load_row(vector, D: tl.constexpr, BD: tl.constexpr):
    """A vector [D] as [1, BD]."""
    o_d = tl.arange(0, BD)
    return tl.load(vector + o_d, mask=o_d < D, other=0.0)[None, :]


@triton.jit
def channels(BD: tl.constexpr, EACH: tl.constexpr):
    """0 to BD - 1, EACH neighbours per thread. Without the hint, Triton gives a thread 4 float32 or 8 bfloat16
    neighbours, 16 bytes, and where a row has both, it exchanges numbers between threads in each row."""
    return tl.max_contiguous(tl.arange(0, BD), EACH)


@triton.jit
def tokens_of_program(T, tokens):
    """A program's sample, its first token and the end of its tokens: axis 0 counts samples, axis 1 parts of one."""
    first = tl.program_id(1).to(tl.int64) * tokens
    return tl.program_id(0).to(tl.int64), first, tl.minimum(first + tokens, T)


def cdiv(n: int, size: int) -> int:
    """ceil(n / size). triton.cdiv and triton.next_power_of_2 take 5 us: they serve kernels as well."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def tokens_per_program(x: torch.Tensor, resident: int) -> int:
    """Tokens for each program of a kernel on x [B, T, D], where `resident` programs run on a multiprocessor at once:
    as few waves of programs as keep all multiprocessors busy."""
    return _tokens_per_program(x.shape[0], x.shape[1], processors(x.device) * resident)


def processors(device: torch.device) -> int:
    """Multiprocessors of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return PROCESSORS[device.type]


@functools.cache
def _tokens_per_program(samples: int, tokens: int, slots: int) -> int:
    def time(each: int) -> int:
        waves = cdiv(samples * cdiv(tokens, each), slots)
        return waves * (each + START)

    return min((cdiv(tokens, parts) for parts in range(1, tokens + 1)), key=time, default=1)
