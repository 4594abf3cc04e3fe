"""The best guidance: scale and interval with the smallest Frechet distance, coarse to fine on few samples, confirmed
on many.

Every candidate is measured on the same noise and labels (common random numbers), so that of the difference between two
only the guidance is left: far fewer samples rank them than an exact distance takes.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch

from unite_fast.config import SamplingConfig, check_seed_and_batch
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError, require, require_choice
from unite_fast.evaluation.evaluator import Judge
from unite_fast.evaluation.fid import Moments
from unite_fast.evaluation.provenance import described_checkpoint, described_sampling
from unite_fast.sampling.distributed_sampler import Generation, Samples, sample_distributed
from unite_fast.sampling.pipeline import TrainedUNITE
from unite_fast.sampling.sampler import Network
from unite_fast.utils.files import save_text
from unite_fast.utils.progress import Track, no_progress

COARSEST = (6, 3, 3)
"""Points of the first grid along scale, low and high, at most."""
KEPT = 2
"""Candidates around which each finer grid is laid. On the 100 tilted bowls of tests/evaluation/test_guidance_search.py,
with 301 candidates, 1 finds the best 98 times with 77 measurements on average, 2 find it 99 times with 90, 3 find it 99
times with 101."""
CACHE = "measured.json"


@dataclass(frozen=True, order=True)
class Candidate:
    scale: float
    low: float
    high: float

    def canonical(self) -> "Candidate":
        """The same guidance under one name: without effect, the interval does not matter."""
        return UNGUIDED if self.scale == 1 or self.low >= self.high else self


UNGUIDED = Candidate(1.0, 0.0, 1.0)


@dataclass
class Grid:
    """All scales with all intervals; each list in ascending order."""

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
    def shape(self) -> tuple[int, int, int]:
        return len(self.scales), len(self.lows), len(self.highs)

    def at(self, point: tuple[int, int, int]) -> Candidate:
        scale, low, high = point
        return Candidate(self.scales[scale], self.lows[low], self.highs[high]).canonical()

    def all(self) -> set[Candidate]:
        return {self.at(point) for point in product(*map(range, self.shape))}


def coarse_to_fine(grid: Grid, distance: Callable[[Candidate], float]) -> list[Candidate]:
    """A coarse grid over everything, then grids of half the spacing around the best; at full resolution it goes on
    until no neighbour of the best ones, diagonal ones included, is left to measure.

    Returns:
        What was measured, the best first; equal ones in a fixed order.
    """
    strides = [_stride(length, most) for length, most in zip(grid.shape, COARSEST, strict=True)]
    # The last value belongs to the coarse grid whatever the stride.
    points = set(product(*({*range(0, n, s), n - 1} for n, s in zip(grid.shape, strides, strict=True))))
    found: dict[tuple[int, int, int], float] = {}
    while True:
        new = sorted(points - found.keys())
        if not new and max(strides) == 1:
            break
        found |= {point: distance(grid.at(point)) for point in new}
        strides = [max(1, stride // 2) for stride in strides]
        best = _ranked(grid, found)[:KEPT]
        # The unguided candidate stands at several points, and every interval at the next scale is its neighbour.
        centres = [point for point in found if grid.at(point) in best]
        points = {near for point in centres for near in _neighbours(point, strides, grid.shape)}
    return _ranked(grid, found)


def _ranked(grid: Grid, found: dict[tuple[int, int, int], float]) -> list[Candidate]:
    points = sorted(found, key=lambda point: (found[point], point))
    return list(dict.fromkeys(grid.at(point) for point in points))


def _stride(length: int, most: int) -> int:
    """The smallest power of two that leaves at most so many points, both ends included."""
    stride = 1
    while math.ceil((length - 1) / stride) + 1 > most:
        stride *= 2
    return stride


def _neighbours(point: tuple[int, ...], strides: list[int], shape: tuple[int, ...]):
    steps = ({max(i - s, 0), i, min(i + s, n - 1)} for i, s, n in zip(point, strides, shape, strict=True))
    return product(*steps)


@dataclass
class Measured:
    candidate: Candidate
    first: int
    """Number of the first sample."""
    count: int
    distance: float
    evaluations: int
    """Network passes, each of one image."""
    seconds: float
    """Each process has its own; the file holds rank 0's."""


@dataclass
class Found:
    """Result of a search."""

    searched: list[Measured]
    confirmed: list[Measured]
    """The best first."""
    full_grid_evaluations: float
    """What the whole grid at the full count would have taken; what was not visited counts as the mean of what was."""

    @property
    def evaluations(self) -> int:
        return sum(measured.evaluations for measured in (*self.searched, *self.confirmed))

    @property
    def seconds(self) -> float:
        """Of all measurements, also those that were read from the file."""
        return sum(measured.seconds for measured in (*self.searched, *self.confirmed))


class Objective:
    """Frechet distance of a candidate's samples, shared by all processes; what was measured before is read from a file.

    The samples of the search are number `final_count` and on, those that confirm are 0..final_count - 1, as
    `unite-fast evaluate` draws them: the winner is not judged by the noise that chose it.
    """

    def __init__(
        self,
        model: TrainedUNITE,
        judge: Judge,
        config: SamplingConfig,
        counts: tuple[int, int],
        seed: int,
        batch: int,
        precision: str,
        compile: bool,
        out: Path,
        ranks: Ranks,
        track: Track = no_progress,
        checkpoint: str = "",
    ):
        """
        Args:
            config: how samples are drawn; its guidance and interval are replaced.
            counts: samples a candidate in the search, and to confirm.
            precision: of the network, float32 or bfloat16.
            compile: compile the network, once for all candidates.
            out: folder of the cache; rank 0 reads and writes there.
            checkpoint: where the model comes from, for the JSON.

        Raises:
            UserError: a folder with measurements of other settings.
        """
        check_seed_and_batch(seed, batch)
        require_choice("the precision", precision, ("float32", "bfloat16"))
        require(min(counts) >= 2, f"a Frechet distance needs at least 2 images, got counts {counts[0]} and {counts[1]}")
        self.model, self.judge, self.config = model, judge, config
        self.count, self.final_count = counts
        self.seed, self.batch, self.precision, self.ranks, self.track = seed, batch, precision, ranks, track
        self.compile, self.network = compile, Network.of(model.network, config.order, compile)
        self.checkpoint = described_checkpoint(model, checkpoint)
        how = {key: value for key, value in described_sampling(config).items() if key not in ("guidance", "interval")}
        self.settings = {
            "weights_sha256": self.checkpoint["weights_sha256"],
            "step": model.step,
            **{f"sampling.{key}": value for key, value in how.items()},
            "features": judge.features.name,
            "features_source": judge.features.source,
            "reference": judge.reference.described(),
            "count": self.count,
            "final_count": self.final_count,
            "seed": seed,
            "batch": batch,
            "precision": precision,
            "compile": compile,
        }
        self.notes = judge.bias_notes(*counts)
        self.cache = Cache(out / CACHE, self.settings, ranks)

    def explore(self, candidate: Candidate) -> Measured:
        return self.measure(candidate, self.final_count, self.count)

    def confirm(self, candidate: Candidate) -> Measured:
        return self.measure(candidate, 0, self.final_count)

    def measure(self, candidate: Candidate, first: int, count: int) -> Measured:
        known = self.cache.measured.get((candidate, first, count))
        if known is not None:
            return known
        begun = time.perf_counter()
        features = self.judge.features
        moments, evaluations = Moments(features.dimension, features.device), 0
        for drawn in self._draw(candidate, first, count):
            if len(drawn.images):  # processes may come out even by empty ones
                moments.update(features(drawn.images.to(features.device)).pool)
                evaluations += drawn.evaluations * len(drawn.images)
        distance = self.judge.distance(moments, self.ranks)
        evaluations = sum(self.ranks.gather(evaluations))
        measured = Measured(candidate, first, count, distance, evaluations, time.perf_counter() - begun)
        self.cache.add(measured)
        return measured

    def _draw(self, candidate: Candidate, first: int, count: int) -> Iterable[Samples]:
        """This process's share of samples first..first + count - 1."""
        generation = Generation(
            (first + torch.arange(count)) % self.model.config.model.num_classes,
            replace(self.config, guidance=candidate.scale, interval=(candidate.low, candidate.high)),
            self.seed,
            min(self.batch, count),
            self.precision,
            self.compile,
            first,
        )
        batches = sample_distributed(self.model.network, generation, self.ranks, network=self.network)
        rounds = -(-generation.batches // self.ranks.world)
        title = f"{count} images, guidance {candidate.scale:g} in ({candidate.low:g}, {candidate.high:g})"
        return self.track(batches, rounds, title)


class Cache:
    """Measurements in a JSON file, written anew after each; every process holds them all."""

    def __init__(self, path: Path, settings: dict, ranks: Ranks):
        self.path, self.ranks = path, ranks
        self.settings = json.loads(json.dumps(settings))  # as it comes back from the file: tuples are lists
        outcome = ranks.broadcast(self._read() if ranks.main else None)
        if isinstance(outcome, UserError):
            raise outcome
        self.measured = {(one.candidate, one.first, one.count): one for one in outcome}

    def _read(self) -> list[Measured] | UserError:
        if not self.path.exists():
            return []
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            known, rows = saved["settings"], saved["measured"]
            measured = [Measured(**{**row, "candidate": Candidate(**row["candidate"])}) for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return UserError(f"{self.path} is no file of measurements ({error}): delete it, or choose another --out")
        for key, value in self.settings.items():
            if known.get(key) != value:
                return UserError(
                    f"{self.path.parent} holds measurements with {key} {known.get(key)}, now it is {value}: choose "
                    "another --out, or delete them"
                )
        return measured

    def add(self, measured: Measured) -> None:
        self.measured[measured.candidate, measured.first, measured.count] = measured
        if self.ranks.main:
            rows = [asdict(one) for one in self.measured.values()]
            save_text(json.dumps({"settings": self.settings, "measured": rows}, indent=1) + "\n", self.path)


def search(grid: Grid, objective: Objective, confirm: int = 3) -> Found:
    """Search the grid, then measure the best `confirm` candidates at the full count; and the unguided one, if it is in
    the grid: guidance has to be better than none."""
    ranked = coarse_to_fine(grid, lambda candidate: objective.explore(candidate).distance)
    searched = [objective.explore(candidate) for candidate in ranked]  # all of them are in the cache
    finalists = dict.fromkeys((*ranked[:confirm], *(one for one in ranked if one == UNGUIDED)))
    confirmed = sorted(map(objective.confirm, finalists), key=lambda measured: measured.distance)
    passes = {one.candidate: one.evaluations / one.count for one in searched}
    mean = sum(passes.values()) / len(passes)
    full = sum(passes.get(candidate, mean) for candidate in grid.all()) * objective.final_count
    return Found(searched, confirmed, full)
