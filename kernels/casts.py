"""Weights in the precision of products, cast once for many uses.

A weight is used in several passes of a step, forward and backward, and rounding it at each use is a small kernel and a
pass over memory every time. Within `cast_once`, `cast` gives a copy that was made on entry.

A copy is found by the memory of its weight, so also by what autograd kept of it or a compiled graph hands over. It is
not used where PyTorch's version counter says that the weight was changed since (a change by way of `.data` escapes that
counter), nor where autograd is to see the cast.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNED = 64
"""Each copy begins at a multiple of so many numbers, 128 bytes of bfloat16."""


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

    Others than float32, and sharded ones, are left out; so is all where `dtype` is float32. Within another such block,
    a copy that is there and up to date is used; one that is not is replaced until the inner block ends. Weights that
    follow one another here do so in memory, where each has a multiple of `ALIGNED` numbers: then `joined` is a view.
    """
    global _held
    before = _held
    weights = [w for w in weights if _can_have_a_copy(w, dtype) and _find(w, dtype) is None]
    with torch.no_grad():
        copies = _room(weights, dtype)
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


def joined(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """`cast` of several weights, one below the other: [sum of N, ...] from [N, ...]. Do not write to it."""
    copies = [cast(w, dtype) for w in weights]
    first, shape = copies[0], (sum(len(c) for c in copies), *copies[0].shape[1:])
    end = first.storage_offset()
    for c in copies:
        if c.untyped_storage()._cdata != first.untyped_storage()._cdata or c.storage_offset() != end:
            return torch.cat(copies)
        if not c.is_contiguous():
            return torch.cat(copies)
        end += c.numel()
    return first.as_strided(shape, first.stride())


def _room(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Room for copies with the weights' own strides, in one piece for each device."""
    sizes = [-(-w.numel() // ALIGNED) * ALIGNED for w in weights]
    starts = defaultdict(int)
    places = []
    for w, size in zip(weights, sizes, strict=True):
        places.append(starts[w.device])
        starts[w.device] += size
    pieces = {device: torch.empty(size, dtype=dtype, device=device) for device, size in starts.items()}
    return [
        pieces[w.device].as_strided(w.shape, torch.empty_like(w, device="meta").stride(), place)
        for w, place in zip(weights, places, strict=True)
    ]


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
