"""Adding the gradients of a backward pass to earlier ones with a few launches instead of one per parameter."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def foreach_accumulation(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Run one backward pass inside: its gradients are added to the existing ones at the end, in one foreach call, with
    the same bits as autograd's own sums. Until then both are in memory.

    Not for parameters with hooks that reduce gradients over ranks: a hook would see the new gradient alone.
    """
    previous = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    for parameter, _ in previous:
        parameter.grad = None
    try:
        yield
    finally:
        pairs = [(old, parameter.grad) for parameter, old in previous if parameter.grad is not None]
        if pairs:
            with torch.no_grad():
                torch._foreach_add_([old for old, _ in pairs], [new for _, new in pairs])
        for parameter, old in previous:
            parameter.grad = old
