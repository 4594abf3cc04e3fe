"""Which body of the ops runs: `use` sets it, for the whole process.

`reference` is plain PyTorch. `native` is C++ for tensors on the CPU in float32 or bfloat16. `auto` is native wherever
that can run, reference elsewhere. float64 always takes the reference body, which is exact in it: it is what tests hold
the others against.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from unite_fast.errors import UserError
from unite_fast.kernels import native

NAMES = ("auto", "reference", "native")

_current = "auto"


def use(name: str) -> None:
    """Choose a body, one of `NAMES`.

    Raises:
        UserError: no such body, or it is missing here.
    """
    global _current
    if name not in NAMES:
        raise UserError(f"kernels: there is no body called {name!r}; choose one of {', '.join(NAMES)}")
    if name == "native" and not native.available():
        raise UserError(f"kernels: the native body is missing: {native.reason()}")
    _current = name


@contextmanager
def using(name: str) -> Iterator[None]:
    """`use`, for as long as the block runs."""
    before = _current
    use(name)
    try:
        yield
    finally:
        use(before)


def current() -> str:
    """The name that `use` was last given; "auto" before."""
    return _current


def body_on(device: torch.device) -> str:
    """The body that float32 and bfloat16 tensors on this device get."""
    native_here = device.type == "cpu" and native.available()
    return "native" if _current == "native" or (_current == "auto" and native_here) else "reference"


def available() -> list[str]:
    """The names that `use` takes on this machine."""
    return [name for name in NAMES if name != "native" or native.available()]


def native_for(x: Tensor, out_dtype: torch.dtype | None = None) -> bool:
    """Whether the native body of an op shall run on x and give a result of `out_dtype` or x's own.

    Raises:
        UserError: "native" was asked for, and this is not what it can take.
    """
    if _current == "reference" or x.dtype == torch.float64:
        return False
    able = x.is_cpu and x.dtype in native.TYPES and (out_dtype is None or out_dtype in native.TYPES)
    if _current == "auto":
        return able and native.available()
    if not able:
        raise UserError(
            f"kernels: the native body takes and gives float32 and bfloat16 on the CPU, not {x.dtype} "
            f"{f'to {out_dtype} ' if out_dtype else ''}on {x.device.type}; choose the body 'auto' or 'reference'"
        )
    return True
