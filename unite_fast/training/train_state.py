"""The state of a run between two steps: weights, optimizers, averages, step number."""

import torch
from torch import Tensor

from unite_fast.config import Config
from unite_fast.distributed.dtensor import local, shard_group
from unite_fast.model.unite import UNITE
from unite_fast.optim.adamw import adamw
from unite_fast.optim.ema import EMA
from unite_fast.optim.fused_step import FusedStep
from unite_fast.optim.lr_schedule import learning_rate
from unite_fast.optim.muon import Muon
from unite_fast.optim.param_groups import split_parameters

ADAMW_TENSORS = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "FusedAdam": ("exp_avg", "exp_avg_sq")}
"""State per parameter in torch's and apex's AdamW: step is a scalar, the others have the parameter's shape. Apex's
counts steps once for all parameters."""


class TrainState:
    """Weights, optimizers, averages and step number of a run.

    With a sharded model each rank holds its shard of everything: parameters, optimizer states, averages, and reduced
    gradients. Gradients are whole from a step's first backward pass until they are reduced.

    Attributes:
        model: the trained weights.
        muon, adamw: the two optimizers.
        ema: averages of the weights, for sampling and evaluation.
        step: optimizer steps done, including skipped ones.
        skipped_steps: steps that changed nothing because gradients were not finite; int64 scalar on the device, the
            same on all ranks. Stays 0 if `optim.nonfinite` is stop.
        skipped_in_a_row: skipped steps since the last one that was not, or since this process began.
    """

    def __init__(self, model: UNITE, config: Config):
        self.model = model
        self.config = config
        self.step = 0
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=model.device)
        self.skipped_in_a_row = torch.zeros_like(self.skipped_steps)
        self.ema = EMA(model, config.optim.ema_decay)
        self.muon_parameters, self.adamw_parameters = split_parameters(model)
        self.parameters = list(model.parameters())
        optim = config.optim
        self.muon = Muon(
            self.muon_parameters.values(), 0.0, optim.muon_momentum, optim.eps, getattr(torch, optim.muon_dtype)
        )
        self.adamw = adamw(optim.adamw, self.adamw_parameters.values(), optim.adamw_betas, optim.eps)
        # Allocated here and not in the first step, as in Muon, so that a checkpoint can be loaded into them.
        keys = ADAMW_TENSORS[type(self.adamw).__name__]
        for parameter in self.adamw_parameters.values():
            self.adamw.state[parameter] = {
                key: torch.zeros((), device=parameter.device) if key == "step" else torch.zeros_like(parameter)
                for key in keys
            }
        self.fused_step = FusedStep(self.muon, self.adamw, self.ema, optim.clip_norm)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return learning_rate(self.config.schedule, self.config.train.batch_size, self.step)

    @property
    def last_learning_rate(self) -> float:
        """Learning rate of the last step."""
        return learning_rate(self.config.schedule, self.config.train.batch_size, self.step - 1)

    def apply_gradients(self) -> Tensor:
        """Clip, step both optimizers, update the averages, clear the gradients. The host does not wait for the device.

        Returns:
            Norm of all gradients before clipping; float32 scalar on the model's device, the same on all ranks.
        """
        norm = self.gradient_norm()
        skipped = None
        if self.config.optim.nonfinite == "skip":
            skipped = (~norm.isfinite()).float()
            count = skipped.long()
            self.skipped_steps += count
            self.skipped_in_a_row = (self.skipped_in_a_row + 1) * count
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate
        if self.fused_step.available:
            self.fused_step(norm, skipped)
        else:
            self.clip_gradients(norm)
            for optimizer in (self.muon, self.adamw):
                if skipped is not None:
                    # torch's name, as in its GradScaler: if it is 1, the optimizers do nothing.
                    optimizer.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]  # not in torch's stub
                optimizer.step()
            self.ema.update(skipped)
        for parameter in self.parameters:  # `zero_grad` walks through all modules: a millisecond
            parameter.grad = None
        self.step += 1
        return norm

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Norm of all gradients. Ranks of a shard group hold different shards, so their squares are summed; replicas
        hold the same."""
        if self.fused_step.available:
            norm = self.fused_step.gradient_norm()
        else:
            gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        group = shard_group(self.parameters[0])
        if group is not None:
            square = norm.square()
            torch.distributed.all_reduce(square, group=group)
            norm = square.sqrt()
        return norm

    @torch.no_grad()
    def clip_gradients(self, norm: Tensor) -> None:
        """Scale gradients of this norm to one of at most `optim.clip_norm`."""
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(gradients, (self.config.optim.clip_norm / (norm + 1e-6)).clamp(max=1.0))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, by name, to save or to load in place. Sharded ones are DTensors."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.averages.items()}
        for optimizer, parameters in self._optimizers():
            for name, parameter in parameters.items():
                for key, value in optimizer.state[parameter].items():
                    tensors[f"optim.{name}.{key}"] = value
        return tensors

    def resume_at(self, step: int) -> None:
        """Set the step number, after `tensors()` were loaded."""
        if self.config.optim.adamw == "apex":
            for group in self.adamw.param_groups:
                group["step"] = step
        self.step = step

    def _optimizers(self):
        return ((self.muon, self.muon_parameters), (self.adamw, self.adamw_parameters))
