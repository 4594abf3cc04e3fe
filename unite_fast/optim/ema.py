"""Exponential moving average of the trainable parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from unite_fast.distributed.dtensor import local


class EMA:
    """average = decay * average + (1 - decay) * parameter after each optimizer step, float32.

    The averages start as the parameters and are sharded like them. They are tensors beside the model, so compiling the
    model cannot tie them to it.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, skipped: Tensor | None = None) -> None:
        """
        Args:
            skipped: a scalar on the parameters' device; where it is 1 the averages stay as they are.
        """
        averages, parameters = self._local(self.averages), self._local(self.parameters)
        if skipped is None:
            torch._foreach_lerp_(averages, parameters, 1 - self.decay)
        else:
            moves = torch._foreach_sub(parameters, averages)
            torch._foreach_mul_(moves, (1 - self.decay) * (1 - skipped))
            torch._foreach_add_(averages, moves)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights. Values are copied, not pointers exchanged: what shards a model
        would not see those."""
        parameters = self._local(self.parameters)
        weights = [parameter.clone() for parameter in parameters]
        self._assign(parameters, self._local(self.averages))
        try:
            yield
        finally:
            self._assign(parameters, weights)

    def _assign(self, parameters: list[Tensor], values: list[Tensor]) -> None:
        torch._foreach_copy_(parameters, values)
        # A sharded model may still hold whole parameters, gathered from what was there before.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _local(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        return [local(tensor.detach()) for tensor in tensors.values()]
