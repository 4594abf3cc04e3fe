"""Content of the gallery page: samples, guidance, reconstructions, interpolations and curves. `gallery_page.py`
renders it. `molecules/gallery.py` makes that of molecules.

B samples, N latent tokens, C latent channels, S image size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from unite_fast.config import MOLECULES, SamplingConfig, check_seed_and_batch
from unite_fast.data_pipeline.splits import NoSplit
from unite_fast.errors import UserError, printable, require
from unite_fast.evaluation.batches import TRAINING, check_classes, open_held_out_images, open_images
from unite_fast.evaluation.gallery_page import Chart, Figure, Row, Section
from unite_fast.evaluation.metrics import psnr
from unite_fast.evaluation.pixel_features import read_evenly
from unite_fast.evaluation.trajectory import denoising_trajectory
from unite_fast.randomness import Philox, Stream
from unite_fast.sampling import sampler
from unite_fast.sampling.pipeline import TrainedModel, TrainedUNITE
from unite_fast.utils.progress import track
from unite_fast.utils.rows import read_rows

CURVES = (("l1", "L1 of the reconstruction"), ("lpips", "LPIPS"), ("flow", "flow loss"))
"""Columns of metrics.jsonl to plot, unless they are zero throughout."""


@dataclass
class Counts:
    """Number of images of each kind."""

    classes: int
    per_class: int
    guided: int
    """Classes in the guidance section."""
    pairs: int
    """Originals next to reconstructions."""
    paths: int
    """Interpolations of each kind, and denoising trajectories."""
    points: int
    """Images per path, both ends included."""

    @classmethod
    def for_size(cls, image_size: int) -> "Counts":
        """Fewer if images are large: one of 256 x 256 pixels takes about 160 KB, so the 84 here stay below 15 MB."""
        if image_size <= 64:
            return cls(classes=10, per_class=10, guided=5, pairs=20, paths=4, points=9)
        return cls(classes=5, per_class=4, guided=2, pairs=6, paths=2, points=6)


@dataclass
class RealImages:
    """Real images to reconstruct and interpolate."""

    images: Tensor
    """uint8 [n, 3, S, S]."""
    labels: Tensor
    kind: str
    """Name for the page, in the plural: "held-out images"."""


MOST_SHOWN = 1_000
"""Largest numbers of classes, of guidance scales and of samples per class: more make no page."""


@dataclass
class GallerySettings:
    """Options of the gallery; None: chosen for the model."""

    classes: list[int] | None = None
    per_class: int | None = None
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    data: str | None = ""
    """Folder of the data; empty: the training data; None: show no real images."""
    seed: int = 0
    batch: int = 64
    sampling: dict = field(default_factory=dict)
    """Sampling settings that differ from the recipe's."""

    def __post_init__(self):
        check_seed_and_batch(self.seed, self.batch)
        if self.per_class is not None:
            require(
                0 < self.per_class <= MOST_SHOWN,
                f"the images per class must be in 1..{MOST_SHOWN}, got {self.per_class}",
            )
        require(all(map(math.isfinite, self.scales)), "the guidance scales must be finite")
        for name, values in (("--scales", self.scales), ("--classes", self.classes or [1])):
            require(0 < len(values) <= MOST_SHOWN, f"{name} has {len(values)} values; it must have 1..{MOST_SHOWN}")


def make_gallery(
    model: TrainedUNITE, checkpoint: Path, settings: GallerySettings
) -> tuple[dict[str, str], list[Section]]:
    """Facts for the head of the page, by name, and its sections.

    Args:
        checkpoint: path of the model; a metrics.jsonl in its run folder becomes curves.

    Raises:
        UserError: class or setting out of range, or data missing.
    """
    config = model.config
    sampling = config.sampling.changed(**settings.sampling)
    counts = Counts.for_size(config.model.image_size)
    if settings.per_class:
        counts.per_class = settings.per_class
    classes = settings.classes or evenly_spaced(config.model.num_classes, counts.classes)
    sampler.check_classes(classes, config.model.num_classes)
    real, names = None, [f"class {label}" for label in range(config.model.num_classes)]
    if settings.data is not None:
        real, names = read_real_images(model, settings.data, max(counts.pairs, 2 * counts.paths))
    builder = SectionBuilder(
        model, sampling, names, classes, list(settings.scales), counts, real, settings.seed, settings.batch
    )
    with_real_images = [builder.reconstructions, builder.between_images] if real else []
    build = [builder.samples, builder.guidance, *with_real_images, builder.between_noises, builder.denoising]
    sections = [section() for section in track(build, len(build), "drawing")]
    return model_facts(model, sampling, settings.seed, checkpoint), sections + curves(checkpoint)


def model_facts(model: TrainedModel, sampling: SamplingConfig, seed: int, checkpoint: Path) -> dict[str, str]:
    config, network = model.config, model.network
    encoder, decoder, whole = (
        sum(p.numel() for p in part.parameters()) for part in (network.encoder, network.decoder, network)
    )
    sizes = config.model
    if sizes.modality == MOLECULES:
        samples = f"up to {sizes.latent_tokens} atoms of {', '.join(sizes.symbols)}"
        latents = f"one an atom, of {sizes.latent_channels} channels"
    else:
        samples = f"{sizes.image_size} x {sizes.image_size}, {sizes.num_classes} classes"
        latents = f"{sizes.latent_tokens} tokens of {sizes.latent_channels} channels"
    return {
        "recipe": config.name,
        "checkpoint": str(checkpoint),
        "trained for": f"{model.step:,} optimizer steps of {config.train.batch_size} {sizes.modality}",
        "weights": "averaged (EMA), float32",
        "parameters": f"{whole:,} (encoder {encoder:,}, decoder {decoder:,})",
        sizes.modality: samples,
        "latents": latents,
        "sampling": sampler.describe_sampling(sampling),
        "seed": str(seed),
    }


def read_real_images(model: TrainedUNITE, path: str, count: int) -> tuple[RealImages, list[str]]:
    """Held-out images, or of data without them training images, and the class names.

    Raises:
        UserError: the data cannot be opened, or the classes are not the model's.
    """
    classes = model.config.model.num_classes
    try:
        try:
            source, kind = open_held_out_images(model.config, path)
        except NoSplit:
            source, kind = open_images(model.config, path, "train"), TRAINING
    except UserError as error:
        raise UserError(f"{error}; name the data with --data FOLDER, or give --no-real") from error
    require(
        len(source.class_names) == classes,
        f"the data have {len(source.class_names)} classes and the model has {classes}: give the data of its training",
    )
    check_classes(source, model.class_names)
    return RealImages(*read_evenly(source, count), kind), [printable(name) for name in source.class_names]


def curves(checkpoint: Path, columns: Sequence[tuple[str, str]] = CURVES) -> list[Section]:
    """Losses, and Frechet distances measured during training, if the checkpoint is in a run folder.

    Args:
        columns: of metrics.jsonl, with titles.
    """
    path = checkpoint.absolute()
    runs = [folder for folder in (path, *path.parents[:2]) if (folder / "metrics.jsonl").is_file()]
    if not runs:
        return []
    rows = read_rows(runs[0] / "metrics.jsonl")
    charts = [_chart(title, key, rows) for key, title in columns]
    distances = read_rows(runs[0] / "evaluation" / "curve.jsonl")
    charts.append(_chart(str(distances[-1].get("title")) if distances else "", "distance", distances))
    charts = [chart for chart in charts if len(chart.steps) > 1]
    text = "From metrics.jsonl of the run, against the optimizer step, on a logarithmic scale."
    return [Section("curves", "Training", text, charts=charts)] if charts else []


def _chart(title: str, key: str, rows: list[dict]) -> Chart:
    # Leave out NaN, which a failing run logs, and 0, which has no logarithm.
    values = ((row["step"], row.get(key)) for row in rows)
    points = [(step, value) for step, value in values if isinstance(value, (int, float)) and 0 < value < math.inf]
    return Chart(title, [step for step, _ in points], [value for _, value in points])


def evenly_spaced(total: int, count: int) -> list[int]:
    """At most `count` of the numbers 0..total - 1, evenly spaced."""
    return torch.linspace(0, total - 1, min(count, total)).round().long().tolist()


@dataclass
class SectionBuilder:
    """Builds the sections of the page. Noise depends only on (seed, index of the image), so the same model and settings
    give the same page."""

    model: TrainedUNITE
    sampling: SamplingConfig
    names: list[str]
    """Name of each class."""
    classes: list[int]
    """Classes to show, in order."""
    scales: list[float]
    counts: Counts
    real: RealImages | None
    seed: int
    batch: int

    def samples(self) -> Section:
        per_class = self.counts.per_class
        labels = torch.tensor(self.classes).repeat_interleave(per_class)
        rows = []
        for label, images in zip(self.classes, self._generate(labels).split(per_class), strict=True):
            name = self.names[label]
            alts = [f"generated {name}, {i + 1} of {per_class}" for i in range(per_class)]
            rows.append(Row(name, [Figure([image], [alt]) for image, alt in zip(images, alts, strict=True)]))
        settings = sampler.describe_sampling(self.sampling)
        text = f"One row per class, {per_class} images each, not cherry-picked: {settings}."
        return Section("samples", "Samples", text, rows)

    def guidance(self) -> Section:
        labels = torch.tensor(self.classes[: self.counts.guided])
        columns = [self._generate(labels, guidance=scale) for scale in self.scales]
        rows = [
            Row(
                self.names[label],
                [
                    Figure([image[i]], [f"{self.names[label]} at guidance {scale:g}"], f"w = {scale:g}")
                    for scale, image in zip(self.scales, columns, strict=True)
                ],
            )
            for i, label in enumerate(labels.tolist())
        ]
        low, high = self.sampling.interval
        text = (
            "All images of a row share their noise; only the guidance scale w changes, and w = 1 is unguided. "
            f"Guidance is active for t in ({low:g}, {high:g})."
        )
        return Section("guidance", "Guidance", text, rows)

    def reconstructions(self) -> Section:
        real = self._real_images(self.counts.pairs)
        copies = self._decode(self._tokenize(real.images))
        decibels = psnr(real.images, copies)
        figures = [
            Figure([image, copy], [f"original {name}", f"reconstructed {name}"], f"{name}, {quality:.1f} dB")
            for image, copy, name, quality in zip(
                real.images, copies, self._class_names(real.labels), decibels.tolist(), strict=True
            )
        ]
        text = (
            f"{real.kind.capitalize()}, each to the left of its reconstruction. Mean PSNR of these {len(figures)}: "
            f"{decibels.mean():.2f} dB."
        )
        return Section("reconstructions", "Reconstructions", text, [Row("", figures)])

    def between_images(self) -> Section:
        real = self._real_images(2 * self.counts.paths)
        latents, names = self._tokenize(real.images), self._class_names(real.labels)
        norm = self.model.network.latent_norm
        rows = []
        # Data may be sorted by class: pair an image of the first half with one of the second half.
        for i, k in zip(range(len(latents) // 2), range(len(latents) // 2, len(latents)), strict=False):
            path = torch.stack([between_latents(latents[i], latents[k], s, norm) for s in self._path()])
            before, after = (Figure([real.images[n]], [f"original {names[n]}"], "original") for n in (i, k))
            figures = self._path_figures(self._decode(path), f"between {names[i]} and {names[k]}")
            rows.append(Row(f"{names[i]} to {names[k]}", [before, *figures, after]))
        text = (
            f"The latents of two {real.kind}, interpolated and decoded. Tokens move on the sphere: LayerNorm gives "
            "all tokens the same norm, so the decoder was trained on such points. A straight line would pass through "
            "the inside of the sphere, where tokens are shorter."
        )
        return Section("between-images", "Between two images", text, rows)

    def between_noises(self) -> Section:
        labels = torch.tensor(self.classes[: self.counts.paths])
        a, b = self._noise(2 * len(labels)).chunk(2)
        # cos^2 + sin^2 = 1, so every point between is N(0, 1) again.
        angles = [s * math.pi / 2 for s in self._path()]
        path = torch.stack([math.cos(angle) * a + math.sin(angle) * b for angle in angles], dim=1)
        points = len(angles)
        images = self._decode(self._sample_latents(labels.repeat_interleave(points), path.flatten(0, 1))).split(points)
        rows = [
            Row(name, self._path_figures(row, f"{name}, noise"))
            for name, row in zip(self._class_names(labels), images, strict=True)
        ]
        text = (
            "From one noise to another on the quarter circle cos(a) e1 + sin(a) e2, where every point is again N(0, 1) "
            f"noise; class and settings are constant ({sampler.describe_sampling(self.sampling)})."
        )
        return Section("between-noises", "Between two noises", text, rows)

    def denoising(self) -> Section:
        labels = torch.tensor(self.classes[: self.counts.paths])
        trajectory = denoising_trajectory(self.model.network, labels, self._noise(len(labels)), self.sampling)
        times = sorted(trajectory)
        steps = [
            (t, self._decode(trajectory[t])) for t in (times[i] for i in evenly_spaced(len(times), self.counts.points))
        ]
        rows = []
        for i, name in enumerate(self._class_names(labels)):
            figures = [Figure([images[i]], [f"{name} predicted at t = {t:.2f}"], f"t = {t:.2f}") for t, images in steps]
            rows.append(Row(name, figures))
        text = (
            "The network's predictions of the clean latents on the way from noise (t = 0) to the result (t = 1), "
            "decoded. Early predictions are a mean over all possible results."
        )
        return Section("denoising", "Denoising, step by step", text, rows)

    def _generate(self, labels: Tensor, **changes) -> Tensor:
        return sampler.sample_images(
            self.model.network, labels, replace(self.sampling, **changes), self.seed, self.batch
        )

    def _noise(self, count: int) -> Tensor:
        config, device = self.model.config.model, self.model.network.device
        positions = torch.arange(count, device=device)
        return Philox(self.seed, 0, positions).normal(
            Stream.SAMPLE_NOISE, (config.latent_tokens, config.latent_channels)
        )

    def _sample_latents(self, labels: Tensor, noise: Tensor) -> Tensor:
        network = self.model.network
        parts = zip(labels.to(network.device).split(self.batch), noise.split(self.batch), strict=True)
        return torch.cat([sampler.sample_latents(network, part, start, self.sampling) for part, start in parts])

    def _tokenize(self, images: Tensor) -> Tensor:
        return sampler.tokenize(self.model.network, images, self.seed, self.batch)

    def _decode(self, latents: Tensor) -> Tensor:
        return sampler.decode(self.model.network, latents, self.batch)

    def _real_images(self, count: int) -> RealImages:
        """At most `count` of the real images, evenly spaced."""
        assert self.real is not None  # else the sections with real images are not built
        indices = evenly_spaced(len(self.real.images), count)
        return RealImages(self.real.images[indices], self.real.labels[indices], self.real.kind)

    def _path(self) -> list[float]:
        """Positions of the images on a path, from 0 to 1."""
        return torch.linspace(0, 1, self.counts.points, dtype=torch.float64).tolist()

    def _path_figures(self, images: Tensor, title: str) -> list[Figure]:
        return [
            Figure([image], [f"{title}, {s:.0%} of the way"], f"{s:.0%}")
            for s, image in zip(self._path(), images, strict=True)
        ]

    def _class_names(self, labels: Tensor) -> list[str]:
        return [self.names[label] for label in labels.tolist()]


def between_latents(a: Tensor, b: Tensor, s: float, norm: nn.LayerNorm) -> Tensor:
    """Spherical interpolation (Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985) from latents a
    (s = 0) to b (s = 1), both [N, C] and outputs of `norm`, per token and before the affine of the norm."""
    scale = torch.where(norm.weight == 0, 1, norm.weight)  # a channel with weight 0 is constant
    a, b = ((z.double() - norm.bias) / scale for z in (a, b))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).clamp(-1, 1)[:, None]
    angle = cosine.acos()
    # Equal or opposite tokens have no unique great circle; use the straight line.
    apart = angle.sin() > 1e-6
    sine = torch.where(apart, angle.sin(), 1.0)
    from_a = torch.where(apart, ((1 - s) * angle).sin() / sine, 1 - s)
    from_b = torch.where(apart, (s * angle).sin() / sine, s)
    return ((from_a * a + from_b * b) * norm.weight + norm.bias).float()
