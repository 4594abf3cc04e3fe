"""FlashAttention from whichever flash-attn package is installed: 4 (`flash_attn.cute`), 3 (`flash_attn_interface`)
or 2 (`flash_attn`). None of them runs on a CPU, and this file was never run on a GPU."""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

PACKAGES = ((4, "flash_attn.cute", 9), (3, "flash_attn_interface", 9), (2, "flash_attn", 8))
"""Version, module of `flash_attn_func` and lowest compute capability; newest first."""


@functools.cache
def find() -> tuple[int, Callable] | None:
    """Version and `flash_attn_func` of the newest installed package that supports this GPU."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()[0]
    for version, module, least in PACKAGES:
        # FlashAttention 3 is for Hopper alone.
        if capability < least or (version == 3 and capability != 9):
            continue
        try:
            return version, importlib.import_module(module).flash_attn_func
        except (ImportError, AttributeError):
            continue
    return None


def why_missing() -> str:
    """Why `attend` cannot run on this machine; empty if it can. Call it before `attend`."""
    global _function
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    if not (package := find()):
        return "no flash-attn package is installed that fits this GPU; `pip install 'unite-fast[flash]'`"
    _function = package[1]
    return ""


_function: Callable | None = None
"""What `attend` calls. `why_missing` sets it, because torch.compile cannot trace an import."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v: q, k and v [B, H, T, K], bfloat16, dense in K -> [B, H, T, K]."""
    # All versions take [B, T, H, K], of which only K must be dense. FlashAttention 4 also returns the log-sum-exp.
    assert _function is not None
    out = _function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
