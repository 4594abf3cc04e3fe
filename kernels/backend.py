"""Which body of the ops runs: `use` sets it, for the whole process.

`reference` is plain PyTorch. `native` is C++ for tensors on the CPU. `triton` is for tensors on a CUDA device; where
TRITON_INTERPRET=1 in the environment switched Triton's interpreter on, it takes those on the CPU, very slowly. Both
take float32 and bfloat16. `auto` is native or triton wherever that can run, reference elsewhere. float64 always takes
the reference body, which is exact in it: it is what tests hold the others against.
"""

import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from unite_fast.errors import UserError
from unite_fast.kernels import attention_backends, layout, native

NAMES = ("auto", "reference", "native", "triton")

ATTENTION_NAMES = tuple(attention_backends.ATTEND)

# Asked once: torch.compile can trace neither question, and a graph would break at every choice.
_triton_installed = importlib.util.find_spec("triton") is not None
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"

_current = "auto"
_attention = "sdpa"


def use(name: str) -> None:
    """Choose a body, one of `NAMES`.

    Raises:
        UserError: no such body, or it is missing here.
    """
    global _current
    if name not in NAMES:
        raise UserError(f"kernels: there is no body called {name!r}; choose one of {', '.join(NAMES)}")
    if missing := why_missing(name):
        raise UserError(f"kernels: the {name} body is missing: {missing}")
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


def why_missing(name: str) -> str:
    """Why a body cannot run on this machine; empty if it can."""
    if name == "native":
        return native.reason()
    if name != "triton":
        return ""
    if not _triton_installed:
        return "the package triton is not installed; `pip install triton` (Linux only)"
    if interpreted():
        return _interpreter_fault()
    return "" if torch.cuda.is_available() else "torch sees no CUDA device here"


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU, as the environment said at the first import."""
    return _interpreted


def _interpreter_fault() -> str:
    """Triton's interpreter before 3.7 makes integers of arrays with one element, which numpy refuses since 2.4 (triton
    issue 9171); empty if the two go together."""
    import triton

    if _numbers(triton.__version__) >= (3, 7) or _numbers(np.__version__) < (2, 4):
        return ""
    return (
        f"the interpreter of triton {triton.__version__} cannot work with numpy {np.__version__}; "
        "`pip install 'numpy<2.4'`, or take triton 3.7 or later"
    )


def _numbers(version: str) -> tuple[int, ...]:
    """(3, 7) of 3.7.0+git1234."""
    return tuple(int(part) for part in version.split(".")[:2])


def available() -> list[str]:
    """The names that `use` takes on this machine."""
    return [name for name in NAMES if not why_missing(name)]


def body_on(device: torch.device) -> str:
    """The body that float32 and bfloat16 tensors on this device get."""
    if _current != "auto":
        return _current
    if device.type == "cuda":
        return "triton" if _triton_installed else "reference"
    return "native" if device.type == "cpu" and native.available() else "reference"


def fused_body_on(device: torch.device) -> str:
    """The fast body that serves this device: what a graph that was compiled with one runs, whatever `use` says now."""
    return "triton" if device.type == "cuda" or _current == "triton" else "native"


def choose(x: Tensor, out_dtype: torch.dtype | None = None) -> str:
    """The body of an op that shall run on x and give a result of `out_dtype` or x's own.

    Raises:
        UserError: "native" or "triton" was asked for, and this is not what it can take.
    """
    if _current == "reference" or x.dtype == torch.float64:
        return "reference"
    typed = x.dtype in layout.TYPES and (out_dtype is None or out_dtype in layout.TYPES)
    if _current == "auto":
        return body_on(x.device) if typed else "reference"
    home = "cuda" if _current == "triton" and not interpreted() else "cpu"
    if not typed or x.device.type != home:
        raise UserError(
            f"kernels: the {_current} body takes and gives float32 and bfloat16 on {home}, not {x.dtype} "
            f"{f'to {out_dtype} ' if out_dtype else ''}on {x.device.type}; choose the body 'auto' or 'reference'"
        )
    return _current


def use_attention(
    name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, head_widths: Iterable[int] = (64,)
) -> None:
    """Choose who computes attention, for the whole process: PyTorch as it sees fit (`sdpa`), PyTorch's cuDNN, flash or
    memory-efficient attention, or a flash-attn package (`flash_attn`). All but `sdpa` are for CUDA alone.

    Args:
        device: where it will be computed.
        dtype: of q, k and v.
        head_widths: channels of a head, K, in all attention that there will be.

    Raises:
        UserError: no such choice, or it cannot compute that here.
    """
    global _attention
    if name not in ATTENTION_NAMES:
        raise UserError(f"attention: there is no {name!r}; choose one of {', '.join(ATTENTION_NAMES)}")
    if missing := attention_backends.why_missing(name, device, dtype, head_widths):
        raise UserError(f"attention: {name} cannot run here: {missing}, or choose attention=sdpa")
    _attention = name


def attention_on(device: torch.device) -> str:
    """Who computes attention on this device, one of `ATTENTION_NAMES`."""
    return _attention if device.type == "cuda" else "sdpa"
