"""Weights in the dtype of matmuls, cast once for many uses.

A step uses a weight several times, forward and backward; casting it each time costs a small kernel and a pass over
memory. Within `cast_once`, `cast` returns a copy that was made on entry, and `derived` keeps what is made from it.

A copy is looked up by the memory of its weight, so tensors that autograd saved or a compiled graph passes on find it
too. It is not used if PyTorch's version counter says that the weight changed since (a change through `.data` escapes
that counter), nor if autograd has to record the cast.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

ALIGNED = 64
"""Elements; each copy begins at a multiple of it, 128 bytes of bfloat16."""


@dataclass(frozen=True)
class _Copy:
    tensor: Tensor
    version: int
    """The weight's version counter when it was copied."""
    storage: torch.UntypedStorage
    """The weight's storage, referenced so that no other tensor can get its address."""
    derived: dict[Callable, Any] = field(default_factory=dict)
    """What `derived` made from the copy, by the function that made it."""


_copies: dict[tuple, _Copy] = {}


@contextmanager
def cast_once(weights: Iterable[Tensor], dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Keep copies in `dtype` of these float32 weights during a `with` block; a few launches make them on entry.

    Weights that are not float32 or that are sharded get no copy, and nothing does if `dtype` is float32. In a nested
    block, an up-to-date copy of the outer block is reused, and a stale one is replaced until the inner block ends.
    Consecutive weights are consecutive in memory if each has a multiple of `ALIGNED` elements; `joined` is then a view.
    """
    global _copies
    before = _copies
    weights = [w for w in weights if _can_have_a_copy(w, dtype) and _find(w, dtype) is None]
    with torch.no_grad():
        copies = _empty_copies(weights, dtype)
        if copies:
            torch._foreach_copy_(copies, weights)
    new = {_key(w, dtype): _Copy(c, w._version, w.untyped_storage()) for w, c in zip(weights, copies, strict=True)}
    _copies = before | new
    try:
        yield
    finally:
        _copies = before


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`: itself, its copy of `cast_once`, or a new copy. Do not write to it."""
    if weight.dtype == dtype:
        return weight
    # Dynamo traces plain casts, which the compiler fuses; inside a compiled graph, our operators reach the lines below.
    if torch.compiler.is_compiling() or not _copies or _recorded(weight):
        return weight.to(dtype)
    copy = _find(weight, dtype)
    return weight.to(dtype) if copy is None else copy.tensor


def derived(weight: Tensor, dtype: torch.dtype, make: Callable[[Tensor], T]) -> T:
    """`make(cast(weight, dtype))`; made once if the weight has a copy of `cast_once`. Do not write to it."""
    copy = None if _recorded(weight) else _find(weight, dtype)
    if copy is None:
        return make(cast(weight, dtype))
    if make not in copy.derived:
        copy.derived[make] = make(copy.tensor)
    return copy.derived[make]


def joined(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """`cast` of several weights, concatenated: [N, ...] each -> [sum of N, ...]. Do not write to it."""
    copies = [cast(w, dtype) for w in weights]
    first, shape = copies[0], (sum(len(c) for c in copies), *copies[0].shape[1:])
    end = first.storage_offset()
    for c in copies:
        if c.untyped_storage()._cdata != first.untyped_storage()._cdata or c.storage_offset() != end:
            return torch.cat(copies)
        if not c.is_contiguous():
            return torch.cat(copies)
        end += c.numel()
    whole = first.as_strided(shape, first.stride())
    if _find(weights[0], dtype) is not None:  # then `derived` keeps what is made from the whole, too
        _copies.setdefault(_key(whole, dtype), _Copy(whole, whole._version, whole.untyped_storage()))
    return whole


def _empty_copies(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Uninitialised copies with the weights' own strides, in one allocation per device."""
    sizes = [-(-w.numel() // ALIGNED) * ALIGNED for w in weights]
    starts = defaultdict(int)
    places = []
    for w, size in zip(weights, sizes, strict=True):
        places.append(starts[w.device])
        starts[w.device] += size
    pieces = {device: torch.empty(size, dtype=dtype, device=device) for device, size in starts.items()}
    return [
        pieces[w.device].as_strided(w.shape, _dense_strides(w), place) for w, place in zip(weights, places, strict=True)
    ]


def _dense_strides(weight: Tensor) -> tuple[int, ...]:
    return weight.stride() if weight.is_contiguous() else torch.empty_like(weight, device="meta").stride()


def _can_have_a_copy(weight: Tensor, dtype: torch.dtype) -> bool:
    sharded = hasattr(weight, "placements")  # a DTensor
    return weight.dtype == torch.float32 != dtype and not sharded and not weight.is_inference()


def _recorded(weight: Tensor) -> bool:
    """Whether autograd has to record what is made from a weight."""
    return weight.requires_grad and torch.is_grad_enabled()


def _find(weight: Tensor, dtype: torch.dtype) -> _Copy | None:
    if not _copies or weight.is_inference():
        return None
    copy = _copies.get(_key(weight, dtype))
    return copy if copy is not None and copy.version == weight._version else None


def _key(weight: Tensor, dtype: torch.dtype) -> tuple:
    place = weight.untyped_storage()._cdata, weight.storage_offset()
    return *place, weight.shape, weight.stride(), weight.dtype, dtype
