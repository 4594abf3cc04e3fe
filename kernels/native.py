"""The C++ backend for CPUs: `unite_fast.kernels._native`, built from kernels/csrc where a compiler is found.

The extension is optional. `available()` says whether it was built, `reason()` why not. Calling it when it is missing is
an error, never a silent fallback.
"""

import hashlib
import warnings
from pathlib import Path

import torch
from torch import Tensor

from unite_fast.kernels import tensors


def _hash_of_sources() -> str:
    """The hash of csrc/, as in CMakeLists.txt; empty in a wheel, which has no sources."""
    files = sorted(file for file in (Path(__file__).parent / "csrc").glob("*") if file.suffix in (".cpp", ".h"))
    hashes = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest() if files else ""


try:
    from unite_fast.kernels import _native  # pyright: ignore[reportAttributeAccessIssue]  # built from csrc/

    _import_error = ""
except ImportError as error:
    # It was never built, or it was built for another Python or against a library that is gone. The text says which.
    _native, _import_error = None, str(error)


def _why_missing() -> str:
    if _native is None:
        return (
            f"unite_fast.kernels._native cannot be imported ({_import_error}); install a C++ compiler and the Python "
            "headers, then reinstall unite-fast with `pip install -v` to see the build"
        )
    if _hash_of_sources() in ("", getattr(_native, "sources", None)):
        return ""
    stale = (
        "unite_fast.kernels._native was built from other C++ sources than these; rebuild it with "
        "`pip install -e . --no-deps`, or as CONTRIBUTING.md says"
    )
    # Warn, so that `auto` does not silently fall back to `reference`.
    warnings.warn(stale, stacklevel=2)
    return stale


_missing = _why_missing()


def available() -> bool:
    """Whether the extension was built and loads."""
    return not _missing


def reason() -> str:
    """Why the extension is missing and how to get it; empty if it is there."""
    return _missing


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def rows(x: Tensor) -> tuple[int, int, int, int]:
    """A tensor [B, T, D], dense in D, as csrc/arguments.h reads it."""
    stride = x.stride()
    return x.data_ptr(), tensors.DTYPES[x.dtype], stride[0], stride[1]


def vectors(x: Tensor) -> tuple[int, int, int]:
    """A tensor [B, D], dense in D, as csrc/arguments.h reads it."""
    return x.data_ptr(), tensors.DTYPES[x.dtype], x.stride(0)


def heads(x: Tensor) -> tuple[int, int, int, int]:
    """A tensor [B, H, T, K], dense in K, as csrc/arguments.h reads it."""
    batch, head, token, _ = x.stride()
    return x.data_ptr(), batch, head, token


def run(name: str, *arguments: int | float | Tensor) -> None:
    """Call a C++ function with torch's number of threads. A tensor of three dimensions is passed as `rows`, of two as
    `vectors`, of one as its address: each must come from `tensors.as_input` or be an output that a fake allocated.
    Other tensors must be passed as numbers."""
    numbers = []
    for x in arguments:
        numbers += _PASSED_AS[x.dim()](x) if isinstance(x, Tensor) else (x,)
    getattr(_native, name)(*numbers, torch.get_num_threads())


_PASSED_AS = {1: lambda x: (x.data_ptr(),), 2: vectors, 3: rows}


def philox_words(seed: int, step: int, stream: int, draw: int, positions: Tensor, elements: int) -> Tensor:
    """The words of `unite_fast.randomness.Philox.words`, bit for bit.

    Args:
        seed: in [0, 2**64).
        step: in [0, 2**32).
        stream, draw: each in [0, 2**16).
        positions: int64 [b] on the CPU, not negative.
        elements: words per sample.

    Returns:
        int64 [b, elements], words in [0, 2**32); a view of whole blocks of four, so not contiguous unless 4 divides
        `elements`.

    Raises:
        RuntimeError: the extension is missing.
        ValueError: an argument is out of range.
    """
    return _philox("philox_words", torch.int64, seed, step, stream, draw, positions, elements)


def philox_normals(seed: int, step: int, stream: int, draw: int, positions: Tensor, elements: int) -> Tensor:
    """The normals of `unite_fast.randomness.Philox.normal`, float32 [b, elements]; otherwise as `philox_words`."""
    return _philox("philox_normals", torch.float32, seed, step, stream, draw, positions, elements)


def _philox(name: str, dtype: torch.dtype, seed, step, stream, draw, positions, elements) -> Tensor:
    if _missing:
        raise RuntimeError(_missing)
    for argument, value, bits in (("seed", seed, 64), ("step", step, 32), ("stream", stream, 16), ("draw", draw, 16)):
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name}: {argument} must be in [0, 2**{bits}), got {value}")
    if elements < 0:
        raise ValueError(f"{name}: elements must not be negative, got {elements}")
    if positions.dim() != 1 or positions.dtype != torch.int64 or positions.device.type != "cpu":
        raise ValueError(
            f"{name}: positions must be int64 [b] on the CPU, "
            f"got {positions.dtype} {list(positions.shape)} on {positions.device}"
        )
    out = torch.empty(positions.shape[0], -(-elements // 4) * 4, dtype=dtype)
    # torch's thread count, so that its setting (one thread in a data worker) applies here too.
    getattr(_native, name)(
        seed,
        step,
        int(stream),
        draw,
        positions.contiguous().numpy(),
        elements,
        out.numpy(),
        torch.get_num_threads(),
    )
    return out[:, :elements]
