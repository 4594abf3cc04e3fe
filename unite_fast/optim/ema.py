"""Exponential moving average of the trainable parameters."""

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from unite_fast.distributed.dtensor import local


class EMA:
    """average = decay * average + (1 - decay) * parameter after each optimizer step, float32.

    The averages start at the parameters' values and are sharded like them. They are plain tensors outside the model, so
    compiling the model does not affect them.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, skipped: Tensor | None = None, except_for: Container[Tensor] = ()) -> None:
        """
        Args:
            skipped: None, or a float32 scalar on the parameters' device; if it is 1, the averages do not change.
            except_for: parameters whose averages do not change.
        """
        parameters = {name: p for name, p in self.parameters.items() if p not in except_for}
        if not parameters:
            return
        averages = self._local({name: self.averages[name] for name in parameters})
        parameters = self._local(parameters)
        if skipped is None:
            torch._foreach_lerp_(averages, parameters, 1 - self.decay)
        else:
            updates = torch._foreach_sub(parameters, averages)
            torch._foreach_mul_(updates, (1 - self.decay) * (1 - skipped))
            torch._foreach_add_(averages, updates)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Context in which the model has the averaged weights. Values are copied, because FSDP would not notice swapped
        tensors."""
        parameters = self._local(self.parameters)
        weights = [parameter.clone() for parameter in parameters]
        self._assign(parameters, self._local(self.averages))
        try:
            yield
        finally:
            self._assign(parameters, weights)

    def _assign(self, parameters: list[Tensor], values: list[Tensor]) -> None:
        torch._foreach_copy_(parameters, values)
        # Parameters that FSDP gathered before the copy are stale.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _local(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [local(tensor.detach()) for tensor in tensors.values()]
