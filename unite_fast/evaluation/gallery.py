"""What a trained model can do, as one page of pictures: what is drawn. `gallery_page.py` says how it looks.

B samples, N latent tokens, C latent channels, S image size.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from unite_fast.config import SamplingConfig, check_seed_and_batch
from unite_fast.errors import UserError, require
from unite_fast.evaluation.batches import open_named
from unite_fast.evaluation.gallery_page import Chart, Figure, Row, Section
from unite_fast.evaluation.metrics import psnr
from unite_fast.evaluation.pixel_features import read_some
from unite_fast.randomness import Philox, Stream
from unite_fast.sampling import sampler
from unite_fast.sampling.pipeline import TrainedUNITE
from unite_fast.utils.files import read_rows
from unite_fast.utils.progress import track

CURVES = (("l1", "L1 of the reconstruction"), ("lpips", "LPIPS"), ("flow", "flow loss"))
"""Columns of metrics.jsonl that are shown, where they are not zero throughout."""


@dataclass
class Counts:
    """How much is drawn of each kind."""

    classes: int
    per_class: int
    ladder: int
    """Classes on the guidance ladder."""
    pairs: int
    """Originals beside reconstructions."""
    ways: int
    """Interpolations of each kind, and images whose denoising is shown."""
    stops: int
    """Images on each way, its ends included."""

    @classmethod
    def fitting(cls, image_size: int) -> "Counts":
        """Small images are many. Photographs of 256 x 256 pixels take some 160 KB each: these 84 stay under 15 MB."""
        if image_size <= 64:
            return cls(classes=10, per_class=10, ladder=5, pairs=20, ways=4, stops=9)
        return cls(classes=5, per_class=4, ladder=2, pairs=6, ways=2, stops=6)


@dataclass
class HeldOut:
    """Real images the model is shown with."""

    images: Tensor
    """uint8 [n, 3, S, S]."""
    labels: Tensor
    kind: str
    """What they are, in the plural."""


@dataclass
class Wishes:
    """What the caller may choose; None: what suits the model."""

    classes: list[int] | None = None
    per_class: int | None = None
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    data: str | None = ""
    """Folder of the data, if not the one trained on; None: show no real images."""
    seed: int = 0
    batch: int = 64
    sampling: dict = field(default_factory=dict)
    """Settings of `SamplingConfig` that differ from the recipe's."""

    def __post_init__(self):
        check_seed_and_batch(self.seed, self.batch)
        require(self.per_class is None or self.per_class > 0, "the images per class must be positive")
        require(len(self.scales) > 0 and all(map(math.isfinite, self.scales)), "the guidance scales must be finite")


def make_gallery(model: TrainedUNITE, checkpoint: Path, wishes: Wishes) -> tuple[dict[str, str], list[Section]]:
    """What stands in the page's head, by name, and its sections.

    Args:
        checkpoint: where the model came from; a metrics.jsonl in its run's folder becomes curves.

    Raises:
        UserError: a class or setting that is out of range, or data that are missing.
    """
    config = model.config
    settings = config.sampling.changed(**wishes.sampling)
    counts = Counts.fitting(config.model.image_size)
    if wishes.per_class:
        counts.per_class = wishes.per_class
    classes = wishes.classes or spread(config.model.num_classes, counts.classes)
    sampler.check_classes(classes, config.model.num_classes)
    held_out, names = None, [f"class {label}" for label in range(config.model.num_classes)]
    if wishes.data is not None:
        held_out, names = real_images(model, wishes.data, max(counts.pairs, 2 * counts.ways))
    artist = Artist(model, settings, names, classes, list(wishes.scales), counts, held_out, wishes.seed, wishes.batch)
    of_real = [artist.reconstructions, artist.between_images] if held_out else []
    drawn = [artist.samples, artist.guidance, *of_real, artist.between_noises, artist.denoising]
    sections = [draw() for draw in track(drawn, len(drawn), "drawing")]
    return about(model, settings, wishes.seed, checkpoint), sections + curves(checkpoint)


def about(model: TrainedUNITE, settings: SamplingConfig, seed: int, checkpoint: Path) -> dict[str, str]:
    config, network = model.config, model.network
    encoder, decoder, whole = (
        sum(p.numel() for p in part.parameters()) for part in (network.encoder, network.decoder, network)
    )
    sizes = config.model
    return {
        "recipe": config.name,
        "checkpoint": str(checkpoint),
        "trained for": f"{model.step:,} optimizer steps of {config.train.batch_size} images",
        "weights": "averaged (EMA), float32",
        "parameters": f"{whole:,} (encoder {encoder:,}, decoder {decoder:,})",
        "images": f"{sizes.image_size} x {sizes.image_size}, {sizes.num_classes} classes",
        "latents": f"{sizes.latent_tokens} tokens of {sizes.latent_channels} channels",
        "sampling": how(settings),
        "seed": str(seed),
    }


def real_images(model: TrainedUNITE, path: str, count: int) -> tuple[HeldOut, list[str]]:
    """Images of the test split, or of the training data where there is no test split, and the names of the classes."""
    classes = model.config.model.num_classes
    try:
        source, kind = open_named(model.config, path, "test"), "held-out images"
    except UserError:
        try:
            source, kind = open_named(model.config, path, "train"), "training images"
        except UserError as error:
            raise UserError(f"{error}; name the data with --data FOLDER, or give --no-real to do without") from error
    require(
        len(source.class_names) == classes,
        f"the data have {len(source.class_names)} classes and the model has {classes}: these are other data",
    )
    return HeldOut(*read_some(source, count), kind), source.class_names


def curves(checkpoint: Path) -> list[Section]:
    """Losses, and distances measured during training, if the checkpoint lies in a run's folder."""
    place = checkpoint.absolute()
    runs = [folder for folder in (place, *place.parents[:2]) if (folder / "metrics.jsonl").is_file()]
    if not runs:
        return []
    rows = read_rows(runs[0] / "metrics.jsonl")
    charts = [_chart(title, key, rows) for key, title in CURVES]
    distances = read_rows(runs[0] / "evaluation" / "curve.jsonl")
    charts.append(_chart(distances[-1]["title"] if distances else "", "distance", distances))
    charts = [chart for chart in charts if len(chart.steps) > 1]
    text = "Logarithmic, against the optimizer step, from the run's metrics.jsonl."
    return [Section("curves", "Training", text, charts=charts)] if charts else []


def _chart(title: str, key: str, rows: list[dict]) -> Chart:
    # A run that fails logs NaN, and a logarithm has no place for 0.
    points = [(row["step"], row[key]) for row in rows if 0 < row.get(key, 0) < math.inf]
    return Chart(title, [step for step, _ in points], [value for _, value in points])


def spread(total: int, count: int) -> list[int]:
    """At most `count` of the numbers 0..total - 1, evenly."""
    return torch.linspace(0, total - 1, min(count, total)).round().long().tolist()


def how(settings: SamplingConfig) -> str:
    low, high = settings.interval
    solver = settings.solver if settings.solver == "dopri5" else f"{settings.solver}, {settings.steps} steps"
    guided = f"guidance {settings.guidance:g} for t in ({low:g}, {high:g})"
    return f"{solver}, {'unguided' if settings.guidance == 1 else guided}"


@dataclass
class Artist:
    """Draws the sections of the page. All noise comes from (seed, number of the image): the same model and settings
    give the same page."""

    model: TrainedUNITE
    settings: SamplingConfig
    names: list[str]
    """One a class."""
    classes: list[int]
    """The classes to show, in this order."""
    scales: list[float]
    counts: Counts
    held_out: HeldOut | None
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
        text = f"A row a class, {per_class} images each, none picked: {how(self.settings)}."
        return Section("samples", "Samples", text, rows)

    def guidance(self) -> Section:
        labels = torch.tensor(self.classes[: self.counts.ladder])
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
        low, high = self.settings.interval
        text = (
            "The same noise in a row, the guidance scale w alone changes; w = 1 is unguided. "
            f"Guidance acts for t in ({low:g}, {high:g})."
        )
        return Section("guidance", "Guidance", text, rows)

    def reconstructions(self) -> Section:
        shown = self._held_out(self.counts.pairs)
        copies = self._decode(self._tokenize(shown.images))
        decibels = psnr(shown.images, copies)
        figures = [
            Figure([image, copy], [f"original {name}", f"reconstructed {name}"], f"{name}, {quality:.1f} dB")
            for image, copy, name, quality in zip(
                shown.images, copies, self._named(shown.labels), decibels.tolist(), strict=True
            )
        ]
        text = (
            f"{shown.kind.capitalize()}, each left of what comes back from tokenizer and decoder. Mean PSNR of these "
            f"{len(figures)}: {decibels.mean():.2f} dB."
        )
        return Section("reconstructions", "Reconstructions", text, [Row("", figures)])

    def between_images(self) -> Section:
        shown = self._held_out(2 * self.counts.ways)
        latents, names = self._tokenize(shown.images), self._named(shown.labels)
        norm = self.model.network.latent_norm
        rows = []
        # Data may be sorted by class: the first of a pair comes from their first half, the second from the other.
        for i, k in zip(range(len(latents) // 2), range(len(latents) // 2, len(latents)), strict=False):
            way = torch.stack([between_latents(latents[i], latents[k], s, norm) for s in self._stops()])
            before, after = (Figure([shown.images[n]], [f"original {names[n]}"], "original") for n in (i, k))
            figures = self._along(self._decode(way), f"between {names[i]} and {names[k]}")
            rows.append(Row(f"{names[i]} to {names[k]}", [before, *figures, after]))
        text = (
            f"The latents of two {shown.kind}, interpolated and decoded. Token by token on the sphere: LayerNorm gives "
            "every token the same length, so the points between are such as the decoder was trained on. A straight "
            "line would cut through the inside, where tokens are shorter."
        )
        return Section("between-images", "Between two images", text, rows)

    def between_noises(self) -> Section:
        labels = torch.tensor(self.classes[: self.counts.ways])
        a, b = self._noise(2 * len(labels)).chunk(2)
        # The squares of cos and sin add up to one: every point between is N(0, 1) again.
        angles = [s * math.pi / 2 for s in self._stops()]
        path = torch.stack([math.cos(angle) * a + math.sin(angle) * b for angle in angles], dim=1)
        stops = len(angles)
        images = self._decode(self._latents(labels.repeat_interleave(stops), path.flatten(0, 1))).split(stops)
        rows = [
            Row(name, self._along(row, f"{name}, noise")) for name, row in zip(self._named(labels), images, strict=True)
        ]
        text = (
            "From one noise to another on the quarter circle cos(a) e1 + sin(a) e2, each of whose points is as likely "
            f"a noise as its ends; class and settings stay ({how(self.settings)})."
        )
        return Section("between-noises", "Between two noises", text, rows)

    def denoising(self) -> Section:
        labels = torch.tensor(self.classes[: self.counts.ways])
        path = self._denoising_path(labels, self._noise(len(labels)))
        steps = [(t, self._decode(path[t])) for t in (sorted(path)[i] for i in spread(len(path), self.counts.stops))]
        rows = []
        for i, name in enumerate(self._named(labels)):
            figures = [Figure([images[i]], [f"{name} foreseen at t = {t:.2f}"], f"t = {t:.2f}") for t, images in steps]
            rows.append(Row(name, figures))
        text = (
            "The clean latents that the network foresees along the way from noise (t = 0), decoded: at first a mean "
            "over all that is still possible, at last the result (t = 1)."
        )
        return Section("denoising", "Denoising, step by step", text, rows)

    def _denoising_path(self, labels: Tensor, noise: Tensor) -> dict[float, Tensor]:
        """x_hat [B, N, C] at each time the solver looked at, and the result at t = 1."""
        network = self.model.network
        denoise = sampler.Network.of(network, self.settings.order).denoise
        predict = Watched(denoise, labels.to(network.device), network.config.num_classes, self.settings)
        with torch.no_grad():
            result = sampler.solve(predict, noise)
        # Heun's last look is at t = 1, and dopri5's last step goes past it: neither lies on the way.
        seen = {t: prediction for t, prediction in predict.seen.items() if t < 1}
        return {**seen, 1.0: result}

    def _generate(self, labels: Tensor, **changes) -> Tensor:
        return sampler.sample_images(
            self.model.network, labels, replace(self.settings, **changes), self.seed, self.batch
        )

    def _noise(self, count: int) -> Tensor:
        config, device = self.model.config.model, self.model.network.device
        positions = torch.arange(count, device=device)
        return Philox(self.seed, 0, positions).normal(
            Stream.SAMPLE_NOISE, (config.latent_tokens, config.latent_channels)
        )

    def _latents(self, labels: Tensor, noise: Tensor) -> Tensor:
        network = self.model.network
        parts = zip(labels.to(network.device).split(self.batch), noise.split(self.batch), strict=True)
        return torch.cat([sampler.sample_latents(network, part, start, self.settings) for part, start in parts])

    @torch.no_grad()
    def _tokenize(self, images: Tensor) -> Tensor:
        return sampler.tokenize(self.model.network, images, self.seed, self.batch)

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        parts = [sampler.to_uint8(self.model.network.decode(part)) for part in latents.split(self.batch)]
        return torch.cat(parts)

    def _held_out(self, count: int) -> HeldOut:
        """`count` of the images, or as many as there are, evenly spread."""
        chosen = spread(len(self.held_out.images), count)
        return HeldOut(self.held_out.images[chosen], self.held_out.labels[chosen], self.held_out.kind)

    def _stops(self) -> list[float]:
        return torch.linspace(0, 1, self.counts.stops, dtype=torch.float64).tolist()

    def _along(self, images: Tensor, what: str) -> list[Figure]:
        return [
            Figure([image], [f"{what}, {s:.0%} of the way"], f"{s:.0%}")
            for s, image in zip(self._stops(), images, strict=True)
        ]

    def _named(self, labels: Tensor) -> list[str]:
        return [self.names[label] for label in labels.tolist()]


@dataclass
class Watched(sampler.GuidedPrediction):
    seen: dict[float, Tensor] = field(default_factory=dict)
    """The first prediction at each time."""

    def __call__(self, t: float, x: Tensor, guided: bool | None = None) -> Tensor:
        prediction = super().__call__(t, x, guided)
        self.seen.setdefault(t, prediction)
        return prediction


def between_latents(a: Tensor, b: Tensor, s: float, norm: nn.LayerNorm) -> Tensor:
    """The point at s in [0, 1] on the way from latents a to b, both [N, C] and results of `norm`: spherical
    interpolation (Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985) of each token before the norm's
    affine."""
    scale = torch.where(norm.weight == 0, 1, norm.weight)  # a channel without scale is the same everywhere
    a, b = ((z.double() - norm.bias) / scale for z in (a, b))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).clamp(-1, 1)[:, None]
    angle = cosine.acos()
    # Tokens that coincide, or stand opposite each other, have no one great circle: there the straight line is as good.
    apart = angle.sin() > 1e-6
    sine = torch.where(apart, angle.sin(), 1.0)
    from_a = torch.where(apart, ((1 - s) * angle).sin() / sine, 1 - s)
    from_b = torch.where(apart, (s * angle).sin() / sine, s)
    return ((from_a * a + from_b * b) * norm.weight + norm.bias).float()
