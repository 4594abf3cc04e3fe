"""Guidance, sampling from noise to images or molecules, and reconstruction of images.

B samples, N latent tokens, C latent channels, S image size. A molecule's class is its number of atoms.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from unite_fast import flow
from unite_fast.config import MOLECULES, SamplingConfig, check_count
from unite_fast.errors import UserError, require
from unite_fast.kernels.casts import cast_once
from unite_fast.kernels.tensors import upcast
from unite_fast.model.layers import matmul_weights, real_tokens
from unite_fast.model.unite import UNITE
from unite_fast.randomness import Philox, Stream
from unite_fast.sampling.solvers import ADAPTIVE_SOLVERS, RELEASED_SOLVERS, multistep, multistep_times

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t [B, N, C], t float32 [B], labels int64 [B]) -> clean latents [B, N, C]."""

BUCKET = 8
"""Molecules of a batch are padded to a multiple of this many atoms, so that there are few shapes to compile for."""


class NonFinite(UserError):
    """Sampled or decoded images or molecules have values that are NaN or infinite; as pixels they would be black or
    white.

    Attributes:
        count: of such samples, in the batch.
    """

    def __init__(self, count: int, batch: int, cause: str):
        super().__init__(f"{count} of {batch} samples of a batch are not finite (NaN or infinite): {cause}")
        self.count = count


@dataclass
class Network:
    """The two functions of a model that sampling calls, eager or compiled."""

    denoise: Denoiser
    decode: Callable[[Tensor, Tensor], Tensor]
    """Latents [B, N, C], labels int64 [B] -> images [B, 3, S, S], or what `decode_molecules` returns."""

    @classmethod
    def of(cls, model: UNITE, order: str, compiled: bool = False) -> "Network":
        """`order` as in `SamplingConfig`: cfg_first guides predictions before the final LayerNorm."""
        if model.config.modality == MOLECULES:
            network = cls(partial(_denoise_molecules, model), partial(decode_molecules, model))
        else:
            denoise = model.encoder if order == "cfg_first" else model.denoise
            network = cls(denoise, lambda latents, labels: model.decode(latents))
        return network.compiled() if compiled else network

    def compiled(self, **options) -> "Network":
        """A compiled copy, for one batch size: compiles a guided step, an unguided step and the decoder."""
        return Network(
            torch.compile(self.denoise, dynamic=False, **options), torch.compile(self.decode, dynamic=False, **options)
        )


def _denoise_molecules(model: UNITE, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return model.denoise(x_t, t, labels, labels)


def decode_molecules(model: UNITE, latents: Tensor, sizes: Tensor) -> Tensor:
    """Latents [B, N, C] and numbers of atoms int64 [B] -> molecules float32 [B, T, 4], T = model.config.latent_tokens:
    the number of each atom's element and its position in Angstrom; 0 in pads."""
    logits, positions = model.decode(latents, sizes)
    atoms = torch.cat((logits.argmax(-1, keepdim=True).float(), positions), dim=-1)
    real = real_tokens(sizes, atoms.shape[1])
    # NaN logits would give an element all the same.
    atoms = torch.where(real[..., None], atoms + 0 * logits.sum(-1, keepdim=True), 0.0)
    return F.pad(atoms, (0, 0, 0, model.config.latent_tokens - atoms.shape[1]))


def latent_shape(model: UNITE, labels: Tensor) -> tuple[int, int]:
    """(N, C) of a batch with these labels. The labels are on the CPU."""
    tokens = model.config.latent_tokens
    if model.config.modality == MOLECULES:
        tokens = min(tokens, -(-int(labels.max()) // BUCKET) * BUCKET)
    return tokens, model.config.latent_channels


@dataclass
class GuidedPrediction:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), active inside an interval of times (Kynkaanniemi et
    al., arXiv 2404.07724). Outside the interval the unconditional pass is skipped."""

    denoise: Denoiser
    labels: Tensor
    """int64 [B]."""
    no_class: int
    config: SamplingConfig
    evaluations: int = 0
    """Network passes so far, in units of one batch of B samples."""

    def __call__(self, t: float, x: Tensor, guided: bool | None = None) -> Tensor:
        """x [B, N, C] -> x_hat [B, N, C], at least float32. `guided` None: guided if t is inside the interval."""
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
    """noise ~ N(0, 1) float32 [B, N, C] -> latents float32 [B, N, C], with the solver and steps of the config."""
    config = predict.config
    if config.solver != "multistep":
        return RELEASED_SOLVERS[config.solver](predict, noise, time_grid(config))
    x = noise
    for times in smooth_segments(config):
        guided = predict.guided_at((times[0] + times[-1]) / 2)
        x = multistep(partial(predict, guided=guided), x, times)
    return x


def time_grid(config: SamplingConfig) -> list[float]:
    """Step times of euler and heun, from 0 to 1."""
    return flow.shift_time(torch.linspace(0, 1, config.steps + 1), config.time_shift).tolist()


def smooth_segments(config: SamplingConfig) -> list[list[float]]:
    """Step times of multistep from 0 to 1, split where guidance starts and ends.

    x_hat jumps there, so a line through predictions from both sides fits neither. On the digits, guided for t in
    (0.1, 1), the Frechet distance of 20 steps was off by 3.6 % without the split and by 0.5 % with it (docs/LOG.md).
    """
    low, high = config.interval
    jumps = (low, high) if config.guidance != 1 and low < high else ()
    return [multistep_times(config.steps, start, end) for start, end in pairwise(sorted({0.0, *jumps, 1.0}))]


@torch.no_grad()
def sample_latents(model: UNITE, labels: Tensor, noise: Tensor, config: SamplingConfig) -> Tensor:
    """Sample latents from given noise: labels int64 [B], noise ~ N(0, 1) float32 [B, N, C] -> float32 [B, N, C]."""
    denoise = Network.of(model, config.order).denoise
    return solve(GuidedPrediction(denoise, labels, model.config.num_classes, config), noise)


def sample_images(
    model: UNITE,
    labels: Tensor,
    config: SamplingConfig,
    seed: int = 0,
    batch: int = 64,
    first: int = 0,
    precision: str = "float32",
) -> Tensor:
    """Sample one image per label, in batches, in one process (`TrainedUNITE.generate` for a bare model).

    The noise of sample i depends only on (seed, first + i), not on the batch size.

    Args:
        labels: int64 [n], in 0..num_classes - 1.
        precision: see `sample_batch`.

    Returns:
        uint8 [n, 3, S, S], or molecules float32 [n, T, 4] (`decode_molecules`), on the CPU.

    Raises:
        UserError: label out of range.
    """
    check_classes(labels.tolist(), model.config.num_classes)
    network = Network.of(model, config.order)
    positions = torch.arange(first, first + len(labels))
    parts = zip(labels.split(batch), positions.split(batch), strict=True)
    return torch.cat([sample_batch(model, network, *part, config, seed, precision)[0] for part in parts])


@torch.no_grad()
def sample_batch(
    model: UNITE,
    network: Network,
    labels: Tensor,
    positions: Tensor,
    config: SamplingConfig,
    seed: int,
    precision: str = "float32",
    wanted: int | None = None,
    predictor: type[GuidedPrediction] = GuidedPrediction,
) -> tuple[Tensor, int]:
    """Sample one batch with a prepared (perhaps compiled) network.

    Args:
        labels: int64 [B], in 0..num_classes - 1, not checked.
        positions: int64 [B]; the noise of each image is drawn from (seed, position).
        precision: bfloat16 runs the network under autocast, its weights cast once; latents stay float32 between its
            passes.
        wanted: the first images, which are returned; the others only fill up the batch. None: all.
        predictor: class that computes guidance; benchmarks/sampling.py compares several.

    Returns:
        uint8 [B, 3, S, S] or molecules float32 [B, T, 4] (`decode_molecules`) on the CPU, the first `wanted` of them;
        and the network evaluations per sample.

    Raises:
        NonFinite: latents or images are not finite.
    """
    device, shape = model.device, latent_shape(model, labels)
    noise = Philox(seed, 0, positions.to(device)).normal(Stream.SAMPLE_NOISE, shape)
    labels = labels.to(device)
    predict = predictor(network.denoise, labels, model.config.num_classes, config)
    half = precision == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, enabled=half), cast_once(matmul_weights(model) if half else ()):
        latents = solve(predict, noise)
        decoded = network.decode(latents, labels)
        settings = f"{describe_sampling(config)}; try other settings"
        if model.config.modality == MOLECULES:
            return finished_molecules(decoded[:wanted], settings), predict.evaluations
        return finished(decoded[:wanted], latents[:wanted], settings), predict.evaluations


def describe_sampling(config: SamplingConfig) -> str:
    """Solver, steps and guidance."""
    low, high = config.interval
    solver = config.solver if config.solver in ADAPTIVE_SOLVERS else f"{config.solver}, {config.steps} steps"
    guided = f"guidance {config.guidance:g} for t in ({low:g}, {high:g})"
    return f"{solver}, {'unguided' if config.guidance == 1 else guided}"


def check_classes(labels: Iterable[int], num_classes: int) -> None:
    for label in labels:
        require(0 <= label < num_classes, f"class {label} is out of range: this model has classes 0..{num_classes - 1}")


def reconstruct(model: UNITE, images: Tensor, seed: int = 0, batch: int = 64, first: int = 0) -> Tensor:
    """Encode and decode images: uint8 [n, 3, S, S] -> uint8 [n, 3, S, S] on the CPU; see `tokenize`."""
    return decode(model, tokenize(model, images, seed, batch, first), batch)


@torch.no_grad()
def decode(model: UNITE, latents: Tensor, batch: int = 64) -> Tensor:
    """Decode latents: float32 [n, N, C] on the model's device -> images uint8 [n, 3, S, S] on the CPU.

    Raises:
        NonFinite: latents or images are not finite.
    """
    return torch.cat([finished(model.decode(part), part, "decoded latents") for part in latents.split(batch)])


@torch.no_grad()
def tokenize(model: UNITE, images: Tensor, seed: int = 0, batch: int = 64, first: int = 0) -> Tensor:
    """Encode images: uint8 [n, 3, S, S] -> latents float32 [n, N, C] on the model's device.

    Registers are drawn as in training, those of image i from (seed, first + i); the tokenizer runs at t = 0.
    """
    shape = (model.config.latent_tokens, model.config.latent_channels)
    out = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch].to(model.device).float() / 255
        positions = torch.arange(first + start, first + start + len(part), device=model.device)
        registers = Philox(seed, 0, positions).normal(Stream.REGISTERS, shape)
        out.append(model.tokenize(part, registers, part.new_zeros(len(part))))
    return torch.cat(out)


def finished(images: Tensor, latents: Tensor, cause: str) -> Tensor:
    """`to_uint8` of decoded images [B, 3, S, S], once they and their latents are known to be finite.

    Args:
        latents: [B, N, C], from which the images were decoded.
        cause: for the message.

    Raises:
        NonFinite: latents or images are not finite.
    """
    # Computed on the device: the count is one number, fetched after the images, for which the host waits anyway.
    finite = images.isfinite().flatten(1).all(1) & latents.isfinite().flatten(1).all(1)
    pixels = to_uint8(images)
    if bad := int((~finite).sum()):
        raise NonFinite(bad, len(images), cause)
    return pixels


def finished_molecules(molecules: Tensor, cause: str) -> Tensor:
    """Molecules [B, T, 4] on the CPU, once they are known to be finite; see `finished`."""
    molecules = molecules.cpu()
    if bad := int((~molecules.isfinite().flatten(1).all(1)).sum()):
        raise NonFinite(bad, len(molecules), cause)
    return molecules


def to_uint8(images: Tensor) -> Tensor:
    """Clamp to [0, 1] and truncate, as the released code does: [..., S, S] -> uint8 on the CPU."""
    return (images.float().clamp(0, 1) * 255).to(torch.uint8).cpu()


def choose_labels(classes: Sequence[int], count: int, num_classes: int) -> Tensor:
    """Labels that cycle through `classes` (all classes if empty): int64 [count].

    Raises:
        UserError: class or count out of range.
    """
    check_count("the number of images", count)
    cycle = classes or range(num_classes)
    check_classes(cycle, num_classes)  # before the tensor is made: int64 overflows at 20 digits
    return torch.tensor(cycle)[torch.arange(count) % len(cycle)]
