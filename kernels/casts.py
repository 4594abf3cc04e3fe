"""Weights in the precision of products, cast once for many uses.

A weight is used in several passes of a step, forward and backward, and rounding it at each use is a small kernel and a
pass over memory every time. Within `cast_once`, `cast` gives a copy that was made on entry.

A copy is found by the memory of its weight, so also by what autograd kept of it or a compiled graph hands over. It is
not used where PyTorch's version counter says that the weight was changed since (a change by way of `.data` escapes that
counter), nor where autograd is to see the cast.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Copy:
    tensor: Tensor
    version: int
    """Of the weight, when it was copied."""
    storage: torch.UntypedStorage
    """The weight's, held so that no other tensor can come to have its address."""


_held: dict[tuple, _Copy] = {}


@contextmanager
def cast_once(weights: Iterable[Tensor], dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Hold copies in `dtype` of these float32 weights while the block runs, made by a few launches on entry.

    Others than float32, and sharded ones, are left out; so is all where `dtype` is float32. Within another such block, a
    copy that is there and up to date is used; one that is not is replaced until the inner block ends.
    """
    global _held
    before = _held
    weights = [w for w in weights if _can_have_a_copy(w, dtype) and _find(w, dtype) is None]
    with torch.no_grad():
        copies = [torch.empty_like(w, dtype=dtype) for w in weights]
        if copies:
            torch._foreach_copy_(copies, weights)
    new = {_key(w, dtype): _Copy(c, w._version, w.untyped_storage()) for w, c in zip(weights, copies, strict=True)}
    _held = before | new
    try:
        yield
    finally:
        _held = before


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`: itself, its copy of `cast_once`, or a new one. Do not write to it."""
    if weight.dtype == dtype:
        return weight
    # Dynamo sees plain casts, which a compiler fuses; our operators run this within a compiled graph.
    if torch.compiler.is_compiling() or not _held or (weight.requires_grad and torch.is_grad_enabled()):
        return weight.to(dtype)
    copy = _find(weight, dtype)
    return weight.to(dtype) if copy is None else copy


def _can_have_a_copy(weight: Tensor, dtype: torch.dtype) -> bool:
    sharded = hasattr(weight, "placements")  # a DTensor
    return weight.dtype == torch.float32 != dtype and not sharded and not weight.is_inference()


def _find(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    if not _held or weight.is_inference():
        return None
    copy = _held.get(_key(weight, dtype))
    return copy.tensor if copy is not None and copy.version == weight._version else None


def _key(weight: Tensor, dtype: torch.dtype) -> tuple:
    place = weight.untyped_storage()._cdata, weight.storage_offset()
    return *place, weight.shape, weight.stride(), weight.dtype, dtype
