"""Which backend the ops run on: `use` sets it for the whole process.

- `reference`: plain PyTorch.
- `native`: C++, for CPU tensors in float32 and bfloat16.
- `triton`: for CUDA tensors in float32 and bfloat16. With TRITON_INTERPRET=1 in the environment it runs in Triton's
  interpreter instead, very slowly, on CPU tensors.
- `auto`: native or triton wherever one of them can run, otherwise reference. Under torch.compile on a CUDA device, an
  op that lost to the compiled reference on this card (measured.py) runs the reference.

float64 always runs the reference, which is exact enough to judge the others.
"""

import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from unite_fast.errors import UserError
from unite_fast.kernels import attention_backends, measured, native, tensors

NAMES = ("auto", "reference", "native", "triton")

ATTENTION_NAMES = tuple(attention_backends.ATTEND)

# Looked up once: torch.compile can trace neither lookup, so each would break the graph.
_triton_installed = importlib.util.find_spec("triton") is not None
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"

_current = "auto"
_slower: dict[str, list[str]] = {}
"""`measured.slower_ops` of the card that `use` was told."""
_attention = "sdpa"


def use(name: str, device: torch.device | None = None) -> None:
    """Choose a backend, one of `NAMES`.

    Args:
        device: where the ops will run. If it is a CUDA device, `auto` looks up what was measured on this card.

    Raises:
        UserError: unknown backend, or one that cannot run on this machine.
    """
    global _current, _slower
    if name not in NAMES:
        raise UserError(f"kernels: there is no backend {name!r}; choose one of {', '.join(NAMES)}")
    if missing := why_missing(name):
        raise UserError(f"kernels: the {name} backend is missing: {missing}")
    _current = name
    on_card = name == "auto" and device is not None and device.type == "cuda"
    _slower = measured.slower_ops(torch.cuda.get_device_name(device)) if on_card else {}


def unmeasured(device: torch.device) -> str:
    """What to say if `auto` runs Triton on a card that nobody measured; else empty."""
    if _current != "auto" or device.type != "cuda" or backend_on(device) != "triton":
        return ""
    card = torch.cuda.get_device_name(device)
    if measured.covers(card):
        return ""
    return f"Triton runs all ops, but was never measured on {card}; `unite-fast tune` finds the fastest settings here"


@contextmanager
def using(name: str) -> Iterator[None]:
    """`use` within a `with` block."""
    global _current, _slower
    before = _current, _slower
    use(name)
    try:
        yield
    finally:
        _current, _slower = before


def current() -> str:
    """The name last passed to `use`; "auto" at first."""
    return _current


def why_missing(name: str) -> str:
    """Why a backend cannot run on this machine; empty if it can."""
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
    """Whether Triton kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 at the first import)."""
    return _interpreted


def _interpreter_fault() -> str:
    """Why this Triton's interpreter cannot run with this numpy; empty if it can. Before 3.7 it converts arrays of one
    element to integers, which numpy 2.4 forbids (triton issue 9171)."""
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


def backend_on(device: torch.device) -> str:
    """The backend for float32 and bfloat16 tensors on this device."""
    if _current != "auto":
        return _current
    if device.type == "cuda":
        return "triton" if _triton_installed else "reference"
    return "native" if device.type == "cpu" and native.available() else "reference"


def fused_backend_on(device: torch.device) -> str:
    """The fast backend of this device. A compiled graph that contains a fused op runs it whatever `use` says later."""
    return "triton" if device.type == "cuda" or _current == "triton" else "native"


def choose(x: Tensor, out_dtype: torch.dtype | None = None, op: str = "") -> str:
    """The backend for an op on x whose result has `out_dtype`, or x's own.

    Args:
        op: name of the op in measured.json.

    Raises:
        UserError: "native" or "triton" was requested, and it cannot take this device or dtype.
    """
    if _current == "reference" or x.dtype == torch.float64:
        return "reference"
    typed = x.dtype in tensors.DTYPES and (out_dtype is None or out_dtype in tensors.DTYPES)
    if _current == "auto":
        return backend_on(x.device) if typed and not _loses(op, x) else "reference"
    home = "cuda" if _current == "triton" and not interpreted() else "cpu"
    if not typed or x.device.type != home:
        raise UserError(
            f"kernels: the {_current} backend takes float32 and bfloat16 on {home}, not {x.dtype} "
            f"{f'to {out_dtype} ' if out_dtype else ''}on {x.device.type}; choose the backend 'auto' or 'reference'"
        )
    return _current


def _loses(op: str, x: Tensor) -> bool:
    """Whether the compiled reference is faster, and would be compiled here."""
    if not _slower or not torch.compiler.is_compiling():
        return False
    return str(x.dtype).removeprefix("torch.") in _slower.get(op, ()) and x.device.type == "cuda"


def use_attention(
    name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, head_widths: Iterable[int] = (64,)
) -> None:
    """Choose the implementation of attention for the whole process: PyTorch's own choice (`sdpa`); on CUDA, PyTorch's
    cuDNN, flash or memory-efficient attention, or a flash-attn package (`flash_attn`); on a CPU, PyTorch's attention in
    bfloat16 or float32 (`sdpa_bfloat16`, `sdpa_float32`).

    Args:
        device: device of q, k and v.
        dtype: of q, k and v.
        head_widths: head dimensions K that the model has.

    Raises:
        UserError: unknown name, or it cannot run here.
    """
    global _attention
    if name not in ATTENTION_NAMES:
        raise UserError(f"attention: there is no {name!r}; choose one of {', '.join(ATTENTION_NAMES)}")
    if missing := attention_backends.why_missing(name, device, dtype, head_widths):
        raise UserError(f"attention: {name} cannot run here: {missing}, or choose attention=sdpa")
    _attention = name


def attention_on(device: torch.device) -> str:
    """The implementation of attention on this device, one of `ATTENTION_NAMES`."""
    home = "cpu" if _attention in attention_backends.ON_CPU else "cuda"
    return _attention if device.type == home else "sdpa"
