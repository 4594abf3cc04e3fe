"""Search for the fastest settings that compute the same result: one setting after another, each candidate timed in its
own process.

The search is greedy: the values of a setting are tried with the best values of the settings before it. It does not try
all combinations; with little time it tries only the first settings. The result holds for this card only.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from unite_fast.benchmarking.candidate import OK, OUT_OF_MEMORY, OUT_OF_TIME, Trial
from unite_fast.benchmarking.machine import usable_cores
from unite_fast.config import IMAGES, NONDETERMINISTIC_ATTENTION, Config
from unite_fast.distributed.process_group import Ranks
from unite_fast.distributed.strategy import split_batch
from unite_fast.errors import UserError
from unite_fast.kernels import backend, flash
from unite_fast.kernels.attention_backends import ON_CPU
from unite_fast.planning.predict import micro_batches

MARGIN = 1.01
"""A candidate replaces the best one if it is faster by this factor; less is noise."""
PATIENCE = 4.0
"""Time limit of a candidate, as a multiple of the time of the recipe, start included."""

TIMED_IMAGES = 256
"""Maximum images or molecules per rank in a timed step: more micro-batches take longer and add no information."""
RATE = f"{IMAGES}/s"

Run = Callable[[dict[str, object], float], Trial]
"""(settings that differ from the recipe, time limit in seconds) -> the timed candidate."""


@dataclass
class TuneResult:
    """Result of the search.

    Attributes:
        trials: in order; the recipe as it is comes first.
        best: the fastest.
        untried: settings for which no time was left.
    """

    trials: list[Trial]
    best: Trial
    untried: list[dict[str, object]] = field(default_factory=list)

    @property
    def recipe(self) -> Trial:
        return self.trials[0]


@dataclass(frozen=True)
class Axis:
    """One setting and its values to try. `climbs`: the values are in ascending or descending order, and the search
    stops at the first that is not faster. `smaller`: each value takes less memory than the one before."""

    key: str
    values: tuple
    climbs: bool = False
    smaller: bool = False


def timed_batch(config: Config, world: int) -> int:
    """Batch size of the timed steps: the recipe's, or one with fewer micro-batches.

    Raises:
        UserError: the ranks cannot share the recipe's batch.
    """
    per_rank = config.train.batch_size // world
    _, micro_batch = split_batch(Ranks(world=world), config.train.batch_size, config.train.micro_batch)
    sizes = [size for size in micro_batches(per_rank) if size <= TIMED_IMAGES and size % micro_batch == 0]
    return world * max(sizes, default=micro_batch)


def axes(config: Config, cuda: bool, world: int, fixed: set[str]) -> list[Axis]:
    """The settings to try, most promising first.

    Args:
        cuda: whether the device is a CUDA device.
        world: number of ranks.
        fixed: keys that the user set, which are not varied.
    """
    train = config.train
    result = [
        Axis("train.compile", (not train.compile,)),
        Axis("kernels", ("auto",) if config.kernels == "reference" else ("reference",)),
    ]
    if cuda:
        _, micro_batch = split_batch(Ranks(world=world), train.batch_size, train.micro_batch)
        sizes = micro_batches(train.batch_size // world)
        larger = tuple(size for size in reversed(sizes) if size > micro_batch and size % micro_batch == 0)
        smaller = tuple(size for size in sizes if size < micro_batch and micro_batch % size == 0)
        result += [
            Axis("train.micro_batch", larger, climbs=True),
            Axis("train.micro_batch", smaller, climbs=True, smaller=True),
            Axis(
                "attention",
                tuple(name for name in attention_candidates(train.deterministic) if name != config.attention),
            ),
        ]
        # Other sharded runs refuse it (`training.setup.check_cuda_graph`).
        if world == 1 or config.parallel.strategy == "ddp" or not config.parallel.reshard_after_forward:
            result.append(Axis("train.cuda_graph", (not train.cuda_graph,)))
    else:
        cores = usable_cores()
        counts = dict.fromkeys((cores, max(1, cores // 2), 1))
        result.append(Axis("train.threads", tuple(count for count in counts if count != train.threads)))
    if world > 1:
        result.append(Axis("parallel.reshard_after_forward", (not config.parallel.reshard_after_forward,)))
    return [axis for axis in result if axis.values and axis.key not in fixed]


def attention_candidates(deterministic: bool) -> list[str]:
    """Attention backends that may run here; one that cannot fails as a candidate with a reason."""
    excluded = NONDETERMINISTIC_ATTENTION if deterministic else ()
    return [
        name
        for name in backend.ATTENTION_NAMES
        if name not in (*excluded, *ON_CPU) and (name != "flash_attn" or not flash.why_missing())
    ]


def search(
    every: list[Axis], run: Run, budget: float, ranks: Ranks, say: Callable[[str], None], rate: str = RATE
) -> TuneResult:
    """Time the recipe as it is, then variations of one setting after another, for at most `budget` seconds.

    If the recipe itself runs out of memory, the first candidate that fits becomes the best.

    Args:
        say: prints a line about a candidate.
        rate: what is counted, for these lines.

    Raises:
        UserError: nothing ran, or the budget is too small for the recipe.
    """
    start = time.monotonic()

    def time_left() -> float:
        # By the clock of rank 0, so that all ranks decide alike.
        return ranks.broadcast(budget - (time.monotonic() - start))

    def run_trial(settings: dict[str, object], limit: float) -> Trial:
        trial = run(settings, max(limit, 1.0))
        say(f"{describe(settings)}: {outcome(trial, rate)}; {max(0, budget - (time.monotonic() - start)):.0f} s left")
        return trial

    recipe = run_trial({}, time_left())
    result = TuneResult([recipe], recipe)
    if recipe.status == OUT_OF_TIME:
        raise UserError(f"the recipe itself takes more than --budget {budget:g} seconds; give more")
    if recipe.status == OUT_OF_MEMORY:
        # First find something that fits, to compare with: the largest of the smaller micro-batches.
        every = [axis for axis in every if axis.smaller] + [axis for axis in every if not axis.climbs]
    elif recipe.status != OK:
        raise UserError(f"the recipe does not run: {recipe.why}")

    def attempt(settings: dict[str, object]) -> Trial | None:
        seconds = time_left()
        walls = [trial.wall for trial in result.trials if trial.status == OK]
        if walls and seconds < min(walls):
            result.untried.append(settings)
            return None
        trial = run_trial(settings, min(seconds, PATIENCE * recipe.wall) if recipe.status == OK else seconds)
        result.trials.append(trial)
        return trial

    climbed = set()
    for axis in every:
        if axis.key in climbed:
            continue
        for value in axis.values:
            trial = attempt(result.best.settings | {axis.key: value})
            better = trial is not None and trial.images_per_s > MARGIN * result.best.images_per_s
            first_to_fit = better and result.best.status == OUT_OF_MEMORY
            if better:
                assert trial is not None
                result.best = trial
                if axis.climbs and not first_to_fit:
                    climbed.add(axis.key)  # the other direction is slower
            if axis.climbs and (first_to_fit or (not better and result.best.status == OK)):
                break
    if result.best.status != OK:
        raise UserError("every candidate ran out of memory; use a smaller model or train.batch_size")
    return result


def describe(settings: dict[str, object]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items()) or "the recipe as it is"


def outcome(trial: Trial, rate: str = RATE) -> str:
    if trial.status == OK:
        return f"{trial.images_per_s:.1f} {rate}"
    return f"{trial.status}{': ' + trial.why if trial.why else ''}"


def lines(result: TuneResult, rate: str = RATE) -> list[str]:
    """Table of all candidates, and the fastest; `rate` is what is counted."""
    width, column = max(len(describe(trial.settings)) for trial in result.trials), max(9, len(rate))
    text = [f"{'':{width}}  {rate:>{column}} {'step ms':>9} {'memory GB':>9} {'of best':>8}"]
    for trial in result.trials:
        name = f"{describe(trial.settings):{width}}  "
        if trial.status != OK:
            text.append(name + outcome(trial))
            continue
        row, share = trial.row, trial.images_per_s / result.best.images_per_s
        assert row is not None  # the trial is OK
        mark = "  <- fastest" if trial is result.best else ""
        text.append(
            f"{name}{row['images_per_s']:{column}.1f} {row['step_ms']:9.1f} {row['memory_gb']:9.2f} {share:8.1%}{mark}"
        )
    text.append("")
    if count := sum(trial.status == OUT_OF_MEMORY for trial in result.trials):
        text.append(f"{count} of {len(result.trials)} candidates ran out of memory")
    for settings in result.untried:
        text.append(f"not tried, no time left: {describe(settings)}; give a larger --budget")
    if result.best is result.recipe:
        text.append(f"the recipe as it is was the fastest: {result.best.images_per_s:.1f} {rate}")
    elif result.recipe.status == OK:
        gain = result.best.images_per_s / result.recipe.images_per_s - 1
        text.append(f"fastest: {describe(result.best.settings)}, {gain:.1%} more {rate} than the recipe as it is")
    else:
        text.append(f"fastest: {describe(result.best.settings)}; the recipe as it is: {outcome(result.recipe)}")
    return text
