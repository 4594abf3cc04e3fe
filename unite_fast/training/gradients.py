"""Gradients of one backward pass added to those of passes before it, by a few launches instead of one a parameter."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def added_at_once(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Run a backward pass within: what it gives is added to the gradients that were there at the end, all together, and
    each sum is the same as autograd's own. Until then both are in memory. Not for parameters whose gradients hooks
    exchange among processes: hooks would see the new part alone."""
    before = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        both = [(old, parameter.grad) for parameter, old in before if parameter.grad is not None]
        if both:
            with torch.no_grad():
                torch._foreach_add_([old for old, _ in both], [new for _, new in both])
        for parameter, old in before:
            parameter.grad = old
