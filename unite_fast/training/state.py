"""What a run is made of between two steps: weights, optimizers, averages, step number."""

import torch
from torch import Tensor

from unite_fast.config import Config
from unite_fast.model.unite import UNITE
from unite_fast.optim.adamw import adamw
from unite_fast.optim.ema import EMA
from unite_fast.optim.groups import split_parameters
from unite_fast.optim.muon import Muon
from unite_fast.optim.schedule import learning_rate

OPTIMIZER_TENSORS = {
    "Muon": ("momentum",),
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "FusedAdam": ("exp_avg", "exp_avg_sq"),
}
"""What each optimizer keeps of a parameter; AdamW's step is a scalar, the others have the parameter's shape. Apex's
FusedAdam counts its steps once for all parameters."""


class TrainState:
    """
    Attributes:
        model: the weights that train.
        muon, adamw: the two optimizers.
        ema: averages of the weights, which sampling and evaluation use.
        step: optimizer steps done.
    """

    def __init__(self, model: UNITE, config: Config):
        self.model = model
        self.config = config
        self.step = 0
        self.ema = EMA(model, config.optim.ema_decay)
        self.muon_parameters, self.adamw_parameters = split_parameters(model)
        optim = config.optim
        self.muon = Muon(
            self.muon_parameters.values(), 0.0, optim.muon_momentum, optim.eps, getattr(torch, optim.muon_dtype)
        )
        self.adamw = adamw(optim.adamw, self.adamw_parameters.values(), optim.adamw_betas, optim.eps)
        # Now and not in the first step, so that a checkpoint can be read into them.
        for optimizer, parameters in self._optimizers():
            for parameter in parameters.values():
                optimizer.state[parameter] = {
                    key: torch.zeros((), device=parameter.device) if key == "step" else torch.zeros_like(parameter)
                    for key in OPTIMIZER_TENSORS[type(optimizer).__name__]
                }

    @property
    def learning_rate(self) -> float:
        """Rate of the step to come."""
        return learning_rate(self.config.schedule, self.config.train.batch_size, self.step)

    @property
    def last_learning_rate(self) -> float:
        return learning_rate(self.config.schedule, self.config.train.batch_size, self.step - 1)

    def apply_gradients(self) -> Tensor:
        """Clip, step both optimizers, update the averages, clear the gradients.

        Returns:
            Norm of all gradients before clipping, a scalar on the model's device.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm, foreach=True)
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate
            optimizer.step()
        self.ema.update()
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds, by name."""
        named = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        named |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        for optimizer, parameters in self._optimizers():
            for name, parameter in parameters.items():
                for key, value in optimizer.state[parameter].items():
                    named[f"optim.{name}.{key}"] = value
        return named

    def load_tensors(self, named: dict[str, Tensor], step: int = 0) -> None:
        """Take up what `tensors` gave after `step` steps; before the first one the optimizers hold nothing.

        Raises:
            KeyError, RuntimeError: a tensor is missing or of another shape.
        """
        self.model.load_state_dict(_below(named, "model."))
        self.ema.load_state_dict(_below(named, "ema."))
        for optimizer, parameters in self._optimizers() if step else ():
            for name, parameter in parameters.items():
                optimizer.state[parameter] = {
                    key: _fitting(named, f"optim.{name}.{key}", parameter, scalar=key == "step")
                    for key in OPTIMIZER_TENSORS[type(optimizer).__name__]
                }
        if step and self.config.optim.adamw == "apex":
            for group in self.adamw.param_groups:
                group["step"] = step
        self.step = step

    def resume_at(self, step: int) -> None:
        """Count on from a step whose values are in `tensors()` already."""
        if self.config.optim.adamw == "apex":
            for group in self.adamw.param_groups:
                group["step"] = step
        self.step = step

    def _optimizers(self):
        return ((self.muon, self.muon_parameters), (self.adamw, self.adamw_parameters))


def _fitting(named: dict[str, Tensor], name: str, parameter: Tensor, scalar: bool) -> Tensor:
    """An optimizer's tensor on its parameter's device. Checked here, since an optimizer would not notice a gap."""
    held, shape = named[name], torch.Size(()) if scalar else parameter.shape
    if held.shape != shape:
        raise RuntimeError(f"{name} is {list(held.shape)}, not {list(shape)}")
    return held.to(parameter.device)


def _below(named: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
