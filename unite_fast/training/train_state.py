"""What a run is made of between two steps: weights, optimizers, averages, step number."""

import torch
from torch import Tensor

from unite_fast.config import Config
from unite_fast.distributed.dtensor import local, shard_group
from unite_fast.model.unite import UNITE
from unite_fast.optim.adamw import adamw
from unite_fast.optim.ema import EMA
from unite_fast.optim.lr_schedule import learning_rate
from unite_fast.optim.muon import Muon
from unite_fast.optim.param_groups import split_parameters

ADAMW_TENSORS = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "FusedAdam": ("exp_avg", "exp_avg_sq")}
"""What torch's and apex's AdamW keep of a parameter; step is a scalar, the others have the parameter's shape. Apex's
counts its steps once for all parameters."""


class TrainState:
    """
    Of a sharded model each process holds its part of everything: parameters, optimizers, averages, and gradients once
    they are added up; before that, from the first backward pass of a step on, it gathers whole ones.

    Attributes:
        model: the weights that train.
        muon, adamw: the two optimizers.
        ema: averages of the weights, which sampling and evaluation use.
        step: optimizer steps done, skipped ones included.
        skipped_steps: how many of them changed nothing because gradients were not finite: int64 scalar on the device,
            the same on all processes; stays 0 where `optim.nonfinite` is stop.
    """

    def __init__(self, model: UNITE, config: Config):
        self.model = model
        self.config = config
        self.step = 0
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=model.device)
        self.ema = EMA(model, config.optim.ema_decay)
        self.muon_parameters, self.adamw_parameters = split_parameters(model)
        self.parameters = list(model.parameters())
        optim = config.optim
        self.muon = Muon(
            self.muon_parameters.values(), 0.0, optim.muon_momentum, optim.eps, getattr(torch, optim.muon_dtype)
        )
        self.adamw = adamw(optim.adamw, self.adamw_parameters.values(), optim.adamw_betas, optim.eps)
        # Now and not in the first step, as Muon does too, so that a checkpoint can be read into them.
        keys = ADAMW_TENSORS[type(self.adamw).__name__]
        for parameter in self.adamw_parameters.values():
            self.adamw.state[parameter] = {
                key: torch.zeros((), device=parameter.device) if key == "step" else torch.zeros_like(parameter)
                for key in keys
            }

    @property
    def learning_rate(self) -> float:
        """Rate of the step to come."""
        return learning_rate(self.config.schedule, self.config.train.batch_size, self.step)

    @property
    def last_learning_rate(self) -> float:
        return learning_rate(self.config.schedule, self.config.train.batch_size, self.step - 1)

    def apply_gradients(self) -> Tensor:
        """Clip, step both optimizers, update the averages, clear the gradients. Nothing waits for the device.

        Returns:
            Norm of all gradients before clipping, a scalar on the model's device, the same on all processes.
        """
        norm = self.clip_gradients()
        skipped = None
        if self.config.optim.nonfinite == "skip":
            skipped = (~norm.isfinite()).float()
            self.skipped_steps += skipped.long()
        for optimizer in (self.muon, self.adamw):
            if skipped is not None:
                optimizer.found_inf = skipped  # torch's own name: a step with 1 there does nothing
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate
            optimizer.step()
        self.ema.update(skipped)
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return norm

    @torch.no_grad()
    def clip_gradients(self) -> Tensor:
        """Scale the gradients to a norm of at most `clip_norm`; gives the norm before. The processes of a shard group
        hold different parts, and their squares add up; other groups hold the same parts."""
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        group = shard_group(self.parameters[0])
        if group is not None:
            square = norm.square()
            torch.distributed.all_reduce(square, group=group)
            norm = square.sqrt()
        torch._foreach_mul_(gradients, (self.config.optim.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds, by name; sharded ones are DTensors. They can be written in place."""
        named = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        named |= {f"ema.{name}": value for name, value in self.ema.averages.items()}
        for optimizer, parameters in self._optimizers():
            for name, parameter in parameters.items():
                for key, value in optimizer.state[parameter].items():
                    named[f"optim.{name}.{key}"] = value
        return named

    def resume_at(self, step: int) -> None:
        """Count on from a step whose values are in `tensors()` already."""
        if self.config.optim.adamw == "apex":
            for group in self.adamw.param_groups:
                group["step"] = step
        self.step = step

    def _optimizers(self):
        return ((self.muon, self.muon_parameters), (self.adamw, self.adamw_parameters))
