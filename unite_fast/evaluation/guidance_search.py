"""Search for the guidance scale and interval with the smallest Frechet distance: coarse to fine with few samples, then
confirmed with many.

All candidates use the same noise and labels (common random numbers), so that they differ only in guidance. Ranking them
then needs far fewer samples than an exact distance.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch

from unite_fast.config import PRECISIONS, SamplingConfig, check_count, check_seed_and_batch
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError, require, require_choice
from unite_fast.evaluation.evaluator import Evaluator
from unite_fast.evaluation.fid import Moments
from unite_fast.evaluation.provenance import checkpoint_info, sampling_info
from unite_fast.sampling.distributed_sampler import Generation, Samples, sample_distributed
from unite_fast.sampling.pipeline import TrainedUNITE
from unite_fast.sampling.sampler import Network, NonFinite
from unite_fast.utils.files import read_small, save_text
from unite_fast.utils.parse_json import check_kind, parse_json
from unite_fast.utils.progress import Track, no_progress

COARSEST = (6, 3, 3)
"""Maximum points of the first grid along scale, low and high."""
REFINED = 2
"""Best candidates that each finer grid surrounds. On the 100 tilted bowls of tests/evaluation/test_guidance_search.py,
with 301 candidates each, 1 finds the best 98 times with 77 measurements on average, 2 find it 99 times with 90, and 3
find it 99 times with 101."""
CACHE = "measured.json"
LONGEST_CACHE = 2**26
"""Bytes."""


@dataclass(frozen=True, order=True)
class Candidate:
    scale: float
    low: float
    high: float

    def canonical(self) -> "Candidate":
        """`UNGUIDED` if the guidance has no effect, so that equal guidance has one name."""
        return UNGUIDED if self.scale == 1 or self.low >= self.high else self


UNGUIDED = Candidate(1.0, 0.0, 1.0)


Point = tuple[int, int, int]
"""Indices of scale, low and high in a `Grid`."""


@dataclass
class Grid:
    """All combinations of scales, lower and upper ends of the interval; each list ascending."""

    scales: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]

    def __post_init__(self):
        for name, values in asdict(self).items():
            require(bool(values), f"there are no {name} to search")
            require(list(values) == sorted(set(values)), f"the {name} must ascend, got {', '.join(map(str, values))}")
        require(all(map(math.isfinite, self.scales)), "the scales must be finite")
        require(
            self.lows[0] >= 0 and self.highs[-1] <= 1 and self.lows[-1] < self.highs[0],
            "intervals need 0 <= every low < every high <= 1",
        )

    @property
    def shape(self) -> Point:
        return len(self.scales), len(self.lows), len(self.highs)

    def at(self, point: Point) -> Candidate:
        scale, low, high = point
        return Candidate(self.scales[scale], self.lows[low], self.highs[high]).canonical()

    def all(self) -> set[Candidate]:
        scales, lows, highs = map(range, self.shape)
        return {self.at(point) for point in product(scales, lows, highs)}


def coarse_to_fine(grid: Grid, distance: Callable[[Candidate], float]) -> list[Candidate]:
    """Measure a coarse grid, then repeatedly halve the spacing around the best candidates. At full resolution continue
    until all neighbours of the best candidates, diagonal ones included, are measured.

    Returns:
        The measured candidates, best first; ties in a fixed order.
    """
    strides = [_stride(length, most) for length, most in zip(grid.shape, COARSEST, strict=True)]
    # The coarse grid includes the last value, whatever the stride.
    scales, lows, highs = ({*range(0, n, s), n - 1} for n, s in zip(grid.shape, strides, strict=True))
    points: set[Point] = set(product(scales, lows, highs))
    distances: dict[Point, float] = {}
    while True:
        new = sorted(points - distances.keys())
        if not new and max(strides) == 1:
            break
        distances |= {point: distance(grid.at(point)) for point in new}
        strides = [max(1, stride // 2) for stride in strides]
        best = _ranked(grid, distances)[:REFINED]
        # The unguided candidate has several points; its neighbours are all intervals at the next scale.
        centres = [point for point in distances if grid.at(point) in best]
        points = {neighbour for point in centres for neighbour in _neighbours(point, strides, grid.shape)}
    return _ranked(grid, distances)


def _ranked(grid: Grid, distances: dict[Point, float]) -> list[Candidate]:
    points = sorted(distances, key=lambda point: (distances[point], point))
    return list(dict.fromkeys(grid.at(point) for point in points))


def _stride(length: int, most: int) -> int:
    """The smallest power of two that leaves at most `most` points, both ends included."""
    stride = 1
    while math.ceil((length - 1) / stride) + 1 > most:
        stride *= 2
    return stride


def _neighbours(point: Point, strides: list[int], shape: Point) -> Iterator[Point]:
    scales, lows, highs = ({max(i - s, 0), i, min(i + s, n - 1)} for i, s, n in zip(point, strides, shape, strict=True))
    return product(scales, lows, highs)


@dataclass
class Measurement:
    candidate: Candidate
    first: int
    """Index of the first sample."""
    count: int
    distance: float
    """Infinite if images were not finite: the candidate has lost. In JSON null."""
    evaluations: int
    """Network evaluations, summed over images."""
    seconds: float
    """On this rank; the file has those of rank 0."""

    def to_json(self) -> dict:
        return {**asdict(self), "distance": self.distance if math.isfinite(self.distance) else None}

    @classmethod
    def from_json(cls, row: dict) -> "Measurement":
        """
        Raises:
            ValueError: not what `to_json` returns.
        """
        lost = row["distance"] is None
        one = check_kind(cls, {**row, "distance": 0.0} if lost else row)
        return replace(one, distance=math.inf) if lost else one


@dataclass
class SearchResult:
    searched: list[Measurement]
    """Best first."""
    confirmed: list[Measurement]
    """Best first."""
    full_grid_evaluations: float
    """Estimated network evaluations of the whole grid at the full count."""

    @property
    def evaluations(self) -> int:
        return sum(one.evaluations for one in (*self.searched, *self.confirmed))

    @property
    def seconds(self) -> float:
        """Seconds of all measurements, cached ones included."""
        return sum(one.seconds for one in (*self.searched, *self.confirmed))


@dataclass(frozen=True)
class SearchSettings:
    """How each candidate is measured."""

    sampling: SamplingConfig
    """The search replaces guidance and interval."""
    count: int
    """Samples per candidate in the search."""
    final_count: int
    """Samples per candidate to confirm."""
    seed: int = 0
    batch: int = 64
    precision: str = "float32"
    """Precision of the network, float32 or bfloat16."""
    compile: bool = False
    """Compile the network, once for all candidates."""

    def __post_init__(self):
        check_seed_and_batch(self.seed, self.batch)
        require_choice("the precision", self.precision, PRECISIONS)
        check_count("--count", self.count, least=2)
        check_count("--final-count", self.final_count, least=2)


class Objective:
    """Frechet distance of the samples of a candidate, computed on all ranks and cached in a file.

    The search uses samples `final_count` and up, confirmation samples 0..final_count - 1, the same as `unite-fast
    evaluate`: the winner is not confirmed with the noise that selected it.
    """

    def __init__(
        self,
        model: TrainedUNITE,
        evaluator: Evaluator,
        settings: SearchSettings,
        out: Path,
        ranks: Ranks,
        track: Track = no_progress,
        checkpoint: str = "",
    ):
        """
        Args:
            out: folder of the cache, which rank 0 reads and writes.
            checkpoint: path of the model, for the JSON.

        Raises:
            UserError: the cache has measurements with other settings.
        """
        self.model, self.evaluator, self.settings, self.ranks, self.track = model, evaluator, settings, ranks, track
        self.network = Network.of(model.network, settings.sampling.order, settings.compile)
        self.checkpoint = checkpoint_info(model, checkpoint)
        sampling = sampling_info(settings.sampling)
        run = ("count", "final_count", "seed", "batch", "precision", "compile")
        self.provenance = {
            "weights_sha256": self.checkpoint["weights_sha256"],
            "step": model.step,
            **{f"sampling.{key}": sampling[key] for key in sampling if key not in ("guidance", "interval")},
            "features": evaluator.features.name,
            "features_source": evaluator.features.source,
            "reference": evaluator.reference.info(),
            **{key: getattr(settings, key) for key in run},
        }
        self.notes = evaluator.bias_notes(settings.count, settings.final_count)
        self.cache = Cache(out / CACHE, self.provenance, ranks)

    def explore(self, candidate: Candidate) -> Measurement:
        return self.measure(candidate, self.settings.final_count, self.settings.count)

    def confirm(self, candidate: Candidate) -> Measurement:
        return self.measure(candidate, 0, self.settings.final_count)

    def measure(self, candidate: Candidate, first: int, count: int) -> Measurement:
        """Distance of samples first..first + count - 1."""
        cached = self.cache.measurements.get((candidate, first, count))
        if cached is not None:
            return cached
        start = time.perf_counter()
        features = self.evaluator.features
        moments, evaluations, lost = Moments(features.dimension, features.device), 0, False
        try:
            for samples in self._sample(candidate, first, count):
                if len(samples.images):  # the last round of a rank may be empty
                    moments.update(features(samples.images.to(features.device)).pool)
                    evaluations += samples.evaluations * len(samples.images)
        except NonFinite:
            lost = True
        # All ranks together: the images of one may be finite and those of another not.
        lost = any(self.ranks.gather(lost))
        distance = math.inf if lost else self.evaluator.distance(moments, self.ranks)
        evaluations = sum(self.ranks.gather(evaluations))
        measurement = Measurement(candidate, first, count, distance, evaluations, time.perf_counter() - start)
        self.cache.add(measurement)
        return measurement

    def _sample(self, candidate: Candidate, first: int, count: int) -> Iterable[Samples]:
        """This rank's share of samples first..first + count - 1."""
        settings = self.settings
        generation = Generation(
            (first + torch.arange(count)) % self.model.config.model.num_classes,
            replace(settings.sampling, guidance=candidate.scale, interval=(candidate.low, candidate.high)),
            settings.seed,
            min(settings.batch, count),
            settings.precision,
            settings.compile,
            first,
        )
        batches = sample_distributed(self.model.network, generation, self.ranks, network=self.network)
        rounds = -(-generation.batches // self.ranks.world)
        title = f"{count} images, guidance {candidate.scale:g} in ({candidate.low:g}, {candidate.high:g})"
        return self.track(batches, rounds, title)


class Cache:
    """Measurements in a JSON file, rewritten after each one; all ranks have all measurements in memory."""

    def __init__(self, path: Path, settings: dict, ranks: Ranks):
        self.path, self.ranks = path, ranks
        self.settings = json.loads(json.dumps(settings))  # as read back from the file: tuples become lists
        saved = ranks.broadcast(self._read() if ranks.main else None)
        if isinstance(saved, UserError):
            raise saved
        self.measurements = {(one.candidate, one.first, one.count): one for one in saved}

    def _read(self) -> list[Measurement] | UserError:
        if not self.path.exists():
            return []
        try:
            content = parse_json(read_small(self.path, LONGEST_CACHE))
            settings, rows = content["settings"], content["measured"]
            measurements = [Measurement.from_json(row) for row in rows]
            require(isinstance(settings, dict), "no settings")
        except (OSError, ValueError, KeyError, TypeError, UserError) as error:
            return UserError(f"{self.path} is not a file of measurements ({error}): delete it, or choose another --out")
        for key, value in self.settings.items():
            if settings.get(key) != value:
                return UserError(
                    f"{self.path.parent} holds measurements with {key} {settings.get(key)}, now it is {value}: choose "
                    "another --out, or delete them"
                )
        return measurements

    def add(self, measurement: Measurement) -> None:
        self.measurements[measurement.candidate, measurement.first, measurement.count] = measurement
        if self.ranks.main:
            rows = [one.to_json() for one in self.measurements.values()]
            save_text(json.dumps({"settings": self.settings, "measured": rows}, indent=1) + "\n", self.path)


def search(grid: Grid, objective: Objective, confirm: int = 3) -> SearchResult:
    """Search the grid, then measure the best `confirm` candidates at the full count, and the unguided one if it is in
    the grid: guidance has to beat no guidance."""
    ranked = coarse_to_fine(grid, lambda candidate: objective.explore(candidate).distance)
    searched = [objective.explore(candidate) for candidate in ranked]  # from the cache
    finalists = dict.fromkeys((*ranked[:confirm], *(one for one in ranked if one == UNGUIDED)))
    confirmed = sorted(map(objective.confirm, finalists), key=lambda one: one.distance)
    require(
        math.isfinite(confirmed[0].distance),
        "no guidance of this grid gives finite images; search smaller --scales, or other --steps",
    )
    per_image = {one.candidate: one.evaluations / one.count for one in searched}
    # A candidate that was not measured counts as the mean of the measured ones.
    mean = sum(per_image.values()) / len(per_image)
    full = sum(per_image.get(candidate, mean) for candidate in grid.all()) * objective.settings.final_count
    return SearchResult(searched, confirmed, full)
