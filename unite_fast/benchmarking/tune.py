"""Searches the fastest way to compute the same: one setting after another, each candidate timed by itself.

Greedy: a setting's values are tried with the best of the settings before it, and the best one stays. So not all
combinations are seen, and the order says what is tried when time is short. What is fastest here says nothing of another
card.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from unite_fast.benchmarking.candidate import OK, OUT_OF_MEMORY, OUT_OF_TIME, Trial
from unite_fast.benchmarking.machine import usable_cores
from unite_fast.config import NONDETERMINISTIC_ATTENTION, Config
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError
from unite_fast.kernels import backend, flash
from unite_fast.planning.predict import micro_batches

MARGIN = 1.01
"""A candidate replaces the best one if it is so many times as fast: less is noise."""
PATIENCE = 4.0
"""A candidate may take so many times as long as the recipe itself, start included."""

TIMED_IMAGES = 256
"""Images of a process in a timed step, at most: a batch of many micro-batches takes seconds and tells no more."""

Run = Callable[[dict[str, object], float], Trial]
"""Times a candidate: settings that differ from the recipe, and seconds it may take."""


@dataclass
class Found:
    """
    Attributes:
        trials: in the order in which they were tried, the recipe as it is first.
        best: the fastest.
        untried: settings for which no time was left.
    """

    trials: list[Trial] = field(default_factory=list)
    best: Trial | None = None
    untried: list[dict[str, object]] = field(default_factory=list)

    @property
    def recipe(self) -> Trial:
        return self.trials[0]


@dataclass(frozen=True)
class Axis:
    """One setting and its values besides the recipe's. `climbs`: they are ordered by how likely they are to help, and
    the first that does not ends its direction; `smaller`: they take less memory, each less than the one before."""

    key: str
    values: tuple
    climbs: bool = False
    smaller: bool = False


def timed_batch(config: Config, world: int) -> int:
    """The batch size of the steps that are timed: the recipe's, or one of fewer micro-batches."""
    own = config.train.batch_size // world
    now = min(config.train.micro_batch or own, own)
    sizes = [size for size in micro_batches(own) if size <= TIMED_IMAGES and size % now == 0]
    return world * max(sizes, default=now)


def axes(config: Config, cuda: bool, world: int, fixed: set[str]) -> list[Axis]:
    """What can be tried, the most promising first.

    Args:
        cuda: whether the device is a CUDA device.
        world: number of processes.
        fixed: keys that the user gave, which stay.
    """
    train = config.train
    found = [
        Axis("train.compile", (not train.compile,)),
        Axis("kernels", ("auto",) if config.kernels == "reference" else ("reference",)),
    ]
    if cuda:
        own = train.batch_size // world
        now = min(train.micro_batch or own, own)
        sizes = micro_batches(own)
        larger = tuple(size for size in reversed(sizes) if size > now and size % now == 0)
        smaller = tuple(size for size in sizes if size < now and now % size == 0)
        found += [
            Axis("train.micro_batch", larger, climbs=True),
            Axis("train.micro_batch", smaller, climbs=True, smaller=True),
            Axis("attention", tuple(name for name in attentions(train.deterministic) if name != config.attention)),
        ]
    else:
        cores = usable_cores()
        counts = dict.fromkeys((cores, max(1, cores // 2), 1))
        found.append(Axis("train.threads", tuple(count for count in counts if count != train.threads)))
    if world > 1:
        found.append(Axis("parallel.reshard_after_forward", (not config.parallel.reshard_after_forward,)))
    return [axis for axis in found if axis.values and axis.key not in fixed]


def attentions(deterministic: bool) -> list[str]:
    """Those that may run here; a candidate that cannot after all says why."""
    out = NONDETERMINISTIC_ATTENTION if deterministic else ()
    return [
        name
        for name in backend.ATTENTION_NAMES
        if name not in out and (name != "flash_attn" or not flash.why_missing())
    ]


def search(every: list[Axis], run: Run, budget: float, ranks: Ranks, say: Callable[[str], None]) -> Found:
    """Time the recipe as it is, then what differs in one setting after another, as long as `budget` seconds last.

    Where the recipe itself takes too much memory, the best is what first does not.

    Raises:
        UserError: nothing ran, or the budget is too small for the recipe.
    """
    begun, found = time.monotonic(), Found()

    def left() -> float:
        # Processes decide alike, by the clock of one.
        return ranks.broadcast(budget - (time.monotonic() - begun))

    def attempt(settings: dict[str, object]) -> Trial | None:
        seconds = left()
        walls = [trial.wall for trial in found.trials if trial.status == OK]
        if walls and seconds < min(walls):
            found.untried.append(settings)
            return None
        limit = min(seconds, PATIENCE * found.recipe.wall) if walls and found.recipe.status == OK else seconds
        trial = run(settings, max(limit, 1.0))
        found.trials.append(trial)
        say(f"{describe(settings)}: {outcome(trial)}; {max(0, budget - (time.monotonic() - begun)):.0f} s left")
        return trial

    found.best = attempt({})
    if found.best.status == OUT_OF_TIME:
        raise UserError(f"the recipe itself takes more than --budget {budget:g} seconds; give more")
    if found.best.status == OUT_OF_MEMORY:
        # Nothing else can be compared before something fits: smaller micro-batches, the largest that fits.
        every = [axis for axis in every if axis.smaller] + [axis for axis in every if not axis.climbs]
    elif found.best.status != OK:
        raise UserError(f"the recipe does not run: {found.best.why}")
    climbed = set()
    for axis in every:
        if axis.key in climbed:
            continue
        for value in axis.values:
            trial = attempt(found.best.settings | {axis.key: value})
            better = trial is not None and trial.images_per_s > MARGIN * found.best.images_per_s
            fitted = better and found.best.status == OUT_OF_MEMORY
            if better:
                found.best = trial
                if axis.climbs and not fitted:
                    climbed.add(axis.key)  # the other direction is downhill
            if axis.climbs and (fitted or (not better and found.best.status == OK)):
                break
    if found.best.status != OK:
        raise UserError("every candidate ran out of memory; a smaller model or train.batch_size takes less")
    return found


def describe(settings: dict[str, object]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items()) or "the recipe as it is"


def outcome(trial: Trial) -> str:
    if trial.status == OK:
        return f"{trial.images_per_s:.1f} images/s"
    return f"{trial.status}{': ' + trial.why if trial.why else ''}"


def lines(found: Found) -> list[str]:
    """The table of all candidates, what won, and by how much the others were slower."""
    width = max(len(describe(trial.settings)) for trial in found.trials)
    said = [f"{'':{width}}  {'images/s':>9} {'step ms':>9} {'memory GB':>9} {'of best':>8}"]
    for trial in found.trials:
        name = f"{describe(trial.settings):{width}}  "
        if trial.status != OK:
            said.append(name + outcome(trial))
            continue
        row, share = trial.row, trial.images_per_s / found.best.images_per_s
        mark = "  <- fastest" if trial is found.best else ""
        said.append(
            f"{name}{row['images_per_s']:9.1f} {row['step_ms']:9.1f} {row['memory_gb']:9.2f} {share:8.1%}{mark}"
        )
    said.append("")
    if count := sum(trial.status == OUT_OF_MEMORY for trial in found.trials):
        said.append(f"{count} of {len(found.trials)} candidates ran out of memory")
    for settings in found.untried:
        said.append(f"not tried, for want of time: {describe(settings)}; a larger --budget reaches it")
    if found.best is found.recipe:
        said.append(f"the recipe as it is was the fastest: {found.best.images_per_s:.1f} images/s")
    elif found.recipe.status == OK:
        gain = found.best.images_per_s / found.recipe.images_per_s - 1
        said.append(f"fastest: {describe(found.best.settings)}, {gain:.1%} more images/s than the recipe as it is")
    else:
        said.append(f"fastest: {describe(found.best.settings)}; the recipe as it is: {outcome(found.recipe)}")
    return said
