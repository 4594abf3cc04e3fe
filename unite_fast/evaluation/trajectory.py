"""The network's predictions while a solver runs, for pages that show denoising step by step.

B samples, N latent tokens, C latent channels.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unite_fast.config import SamplingConfig
from unite_fast.model.unite import UNITE
from unite_fast.sampling import sampler


@torch.no_grad()
def denoising_trajectory(
    network: UNITE, labels: Tensor, noise: Tensor, sampling: SamplingConfig
) -> dict[float, Tensor]:
    """x_hat [B, N, C] at each time the solver evaluated, and the result at t = 1."""
    denoise = sampler.Network.of(network, sampling.order).denoise
    predict = RecordedPrediction(denoise, labels.to(network.device), network.config.num_classes, sampling)
    result = sampler.solve(predict, noise)
    # Heun's last evaluation is at t = 1, and dopri5's last step goes past it: leave both out.
    return {**{t: prediction for t, prediction in predict.predictions.items() if t < 1}, 1.0: result}


@dataclass
class RecordedPrediction(sampler.GuidedPrediction):
    """Guided prediction that records its results."""

    predictions: dict[float, Tensor] = field(default_factory=dict)
    """The first prediction at each time."""

    def __call__(self, t: float, x: Tensor, guided: bool | None = None) -> Tensor:
        prediction = super().__call__(t, x, guided)
        self.predictions.setdefault(t, prediction)
        return prediction
