"""Generation: guidance, the way from noise to pictures, and back through the tokenizer.

B samples, N latent tokens, C latent channels, S image size.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from unite_fast import flow
from unite_fast.config import SamplingConfig
from unite_fast.errors import require
from unite_fast.kernels.tensors import upcast
from unite_fast.model.unite import UNITE
from unite_fast.randomness import Philox, Stream
from unite_fast.sampling.solvers import RELEASED, multistep, multistep_times

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t [B, N, C], t float32 [B], labels int64 [B]) -> clean latents [B, N, C]."""


@dataclass
class Network:
    """The two halves of a model that generation runs, as they are or compiled."""

    denoise: Denoiser
    decode: Callable[[Tensor], Tensor]
    """Latents [B, N, C] -> images [B, 3, S, S]."""

    @classmethod
    def of(cls, model: UNITE, order: str, compiled: bool = False) -> "Network":
        """`order` is that of `SamplingConfig`: cfg_first combines predictions that no LayerNorm has seen."""
        network = cls(model.encoder if order == "cfg_first" else model.denoise, model.decode)
        return network.compiled() if compiled else network

    def compiled(self, **options) -> "Network":
        """For one batch size: a guided step, an unguided one and the decoder are compiled once each."""
        return Network(*(torch.compile(part, dynamic=False, **options) for part in (self.denoise, self.decode)))


@dataclass
class GuidedPrediction:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), active inside an interval of times (Kynkaanniemi et
    al., arXiv 2404.07724). Where it does not act, there is no pass without label."""

    denoise: Denoiser
    labels: Tensor
    """int64 [B]."""
    no_class: int
    config: SamplingConfig
    evaluations: int = 0
    """Network passes so far, in units of one batch of B samples."""

    def __call__(self, t: float, x: Tensor, guided: bool | None = None) -> Tensor:
        """x [B, N, C] -> x_hat [B, N, C], float32 or better; `guided`, if not given, is what it is at t."""
        if not (self.guided_at(t) if guided is None else guided):
            return self._predict(t, x, self.labels)
        without_label = torch.full_like(self.labels, self.no_class)
        both = self._predict(t, torch.cat((x, x)), torch.cat((self.labels, without_label)))
        conditional, unconditional = both.chunk(2)
        return unconditional + self.config.guidance * (conditional - unconditional)

    def guided_at(self, t: float) -> bool:
        low, high = self.config.interval
        return self.config.guidance != 1.0 and t < high and (low == 0 or t > low)

    def _predict(self, t: float, x: Tensor, labels: Tensor) -> Tensor:
        self.evaluations += len(x) // len(self.labels)
        times = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        return upcast(self.denoise(x, times, labels))


def solve(predict: GuidedPrediction, noise: Tensor) -> Tensor:
    """noise ~ N(0, 1) float32 [B, N, C] -> latents float32 [B, N, C], by the solver and the steps of the settings."""
    config = predict.config
    if config.solver != "multistep":
        return RELEASED[config.solver](predict, noise, time_grid(config))
    x = noise
    for times in smooth_stretches(config):
        guided = predict.guided_at((times[0] + times[-1]) / 2)
        x = multistep(partial(predict, guided=guided), x, times)
    return x


def time_grid(config: SamplingConfig) -> list[float]:
    """The ends of euler's and heun's steps, from 0 to 1, as Python numbers."""
    return flow.shift_time(torch.linspace(0, 1, config.steps + 1), config.time_shift).tolist()


def smooth_stretches(config: SamplingConfig) -> list[list[float]]:
    """The ends of multistep's steps from 0 to 1, parted where guidance sets in or ends.

    There x_hat jumps, and a line through predictions of both sides belongs to neither: on the digits, guided for t in
    (0.1, 1), 20 unparted steps were 3.6 % off in Frechet distance, and so parted 0.5 % (docs/LOG.md).
    """
    low, high = config.interval
    jumps = (low, high) if config.guidance != 1 and low < high else ()
    return [multistep_times(config.steps, start, end) for start, end in pairwise(sorted({0.0, *jumps, 1.0}))]


@torch.no_grad()
def generate_latents(model: UNITE, labels: Tensor, noise: Tensor, config: SamplingConfig) -> Tensor:
    """labels int64 [B], noise ~ N(0, 1) float32 [B, N, C] -> latents float32 [B, N, C]."""
    denoise = Network.of(model, config.order).denoise
    return solve(GuidedPrediction(denoise, labels, model.config.num_classes, config), noise)


def generate(
    model: UNITE,
    labels: Tensor,
    config: SamplingConfig,
    seed: int = 0,
    batch: int = 64,
    first: int = 0,
    precision: str = "float32",
) -> Tensor:
    """Images of the given classes.

    Sample i's noise depends on (seed, first + i) alone, so the batch size does not change what is drawn.

    Args:
        labels: int64 [n], in 0..num_classes - 1.
        precision: see `generate_batch`.

    Returns:
        uint8 [n, 3, S, S] on the CPU.

    Raises:
        UserError: a label that is no class.
    """
    check_classes(labels.tolist(), model.config.num_classes)
    network = Network.of(model, config.order)
    positions = torch.arange(first, first + len(labels))
    parts = zip(labels.split(batch), positions.split(batch), strict=True)
    return torch.cat([generate_batch(model, network, *part, config, seed, precision)[0] for part in parts])


@torch.no_grad()
def generate_batch(
    model: UNITE,
    network: Network,
    labels: Tensor,
    positions: Tensor,
    config: SamplingConfig,
    seed: int,
    precision: str = "float32",
    predictor: type[GuidedPrediction] = GuidedPrediction,
) -> tuple[Tensor, int]:
    """One batch of images.

    Args:
        labels: int64 [B], classes of the model.
        positions: int64 [B]; each image's noise is drawn from (seed, position).
        precision: bfloat16 runs the network under autocast; the latents stay float32 between its passes.
        predictor: how guidance is computed; benchmarks/sampling.py compares ways.

    Returns:
        uint8 [B, 3, S, S] on the CPU, and the network evaluations that each image took.
    """
    device, shape = model.device, (model.config.latent_tokens, model.config.latent_channels)
    noise = Philox(seed, 0, positions.to(device)).normal(Stream.SAMPLE_NOISE, shape)
    predict = predictor(network.denoise, labels.to(device), model.config.num_classes, config)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return to_uint8(network.decode(solve(predict, noise))), predict.evaluations


def check_classes(labels: Iterable[int], num_classes: int) -> None:
    for label in labels:
        require(0 <= label < num_classes, f"class {label} is out of range: this model has classes 0..{num_classes - 1}")


@torch.no_grad()
def reconstruct(model: UNITE, images: Tensor, seed: int = 0, batch: int = 64, first: int = 0) -> Tensor:
    """Images through tokenizer and decoder: uint8 [n, 3, S, S] -> uint8 [n, 3, S, S] on the CPU; see `tokenize`."""
    parts = tokenize(model, images, seed, batch, first).split(batch)
    return torch.cat([to_uint8(model.decode(part)) for part in parts])


@torch.no_grad()
def tokenize(model: UNITE, images: Tensor, seed: int = 0, batch: int = 64, first: int = 0) -> Tensor:
    """uint8 [n, 3, S, S] -> latents float32 [n, N, C] on the model's device.

    The registers are drawn as in training, image i's from (seed, first + i); the tokenizer's time is 0.
    """
    shape = (model.config.latent_tokens, model.config.latent_channels)
    out = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch].to(model.device).float() / 255
        positions = torch.arange(first + start, first + start + len(part), device=model.device)
        registers = Philox(seed, 0, positions).normal(Stream.REGISTERS, shape)
        out.append(model.tokenize(part, registers, part.new_zeros(len(part))))
    return torch.cat(out)


def to_uint8(images: Tensor) -> Tensor:
    """Clamp to [0, 1] and truncate, as the released code does: [..., S, S] -> uint8 on the CPU."""
    return (images.float().clamp(0, 1) * 255).to(torch.uint8).cpu()


def choose_labels(classes: Sequence[int], count: int, num_classes: int) -> Tensor:
    """Labels that cycle through `classes` (all, if empty): int64 [count].

    Raises:
        UserError: a class out of range.
    """
    cycle = classes or range(num_classes)
    check_classes(cycle, num_classes)  # before the tensor, which cannot hold a number of 20 digits
    return torch.tensor([cycle[i % len(cycle)] for i in range(count)])
