"""`unite-fast bench` and `tune`: read the recipe, measure, print and save the results."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch

from unite_fast.benchmarking import candidate, csv_file, figures, plot, tuned_file
from unite_fast.benchmarking.measure import Window, measure, sigterm_unwinds
from unite_fast.benchmarking.tune import axes, lines, search, timed_batch
from unite_fast.config import MOLECULES, Config
from unite_fast.data_pipeline import detect_source
from unite_fast.distributed.launch import ranks_of_torchrun
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError
from unite_fast.recipes import load_config
from unite_fast.training import cuda_graph
from unite_fast.utils.device import choose_device

DATA_KEYS = ("data.source=", "data.path=")


def read_recipe(words: list[str], tuned: str, data: str) -> tuple[Config, tuple[str, ...]]:
    """The recipe with its data replaced, and the settings given with it.

    Args:
        words: recipe, then key=value.
        tuned: a file of `unite-fast tune`, or empty.
        data: path of the images or molecules; empty: synthetic ones.

    Raises:
        UserError: no such recipe, setting or data.
    """
    recipe, overrides = words[0], tuple(words[1:])
    if "=" in recipe and not Path(recipe).is_file():
        raise UserError(f"say which recipe to time before the settings: unite-fast bench RECIPE {recipe}")
    for override in overrides:
        if override.startswith(DATA_KEYS):
            raise UserError(f"{override}: bench uses synthetic data, or those of --data PATH; leave this setting out")
    config = load_config(recipe, overrides, tuned)
    kind, path = "synthetic", ""
    if data:
        kind, path = (MOLECULES, data) if config.model.modality == MOLECULES else detect_source(data)
    # The recipe's loader may not fit another source.
    loader = config.data.loader if data else "auto"
    return replace(config, data=replace(config.data, source=kind, path=path, loader=loader)), overrides


def bench(
    config: Config,
    overrides: tuple[str, ...],
    data: str,
    warmup: int,
    steps: int,
    seconds: float,
    profile: bool,
    table: Path | None,
    as_json: bool,
) -> None:
    """Measure; rank 0 prints the figures and adds them to the table."""
    settled = cuda_graph.SETTLED if config.train.cuda_graph else 0
    window = Window(max(warmup, settled), steps, seconds, profile)
    if table is not None and table.exists():
        csv_file.read(table)  # raises early, before minutes of measuring
    measured = measure(config, window)
    if not measured.ranks.main:
        return
    row = figures.row(config, measured, window, data or "synthetic", overrides)
    if as_json:
        top = {"top_kernels": measured.top} if profile else {}
        print(json.dumps(row | top, indent=1))
    else:
        print(*figures.lines(row, measured.top, config.model.modality), sep="\n")
    # After printing, so that a full disk does not lose the figures.
    if table is not None:
        csv_file.append(table, row)
        if not as_json:
            print(f"row added      {table}")


def draw(table: Path, out: Path) -> None:
    if Ranks.from_environment().main:
        count, left_out = plot.draw(table, out)
        print(f"{count} measurements of {table} in {out}")
        if left_out:
            print(left_out)


def tune(recipe: str, overrides: tuple[str, ...], budget: float, out: Path) -> None:
    """Search; rank 0 prints the result and writes it to `out`."""
    words = (recipe, *overrides)
    config, _ = read_recipe(list(words), "", "")
    tuned_file.check(out, recipe)
    cuda = choose_device(config.train.device).type == "cuda"
    fixed, rate = {override.partition("=")[0] for override in overrides}, f"{config.model.modality}/s"
    # The ranks of the search communicate on the CPU: the GPUs belong to the candidates.
    with sigterm_unwinds(), ranks_of_torchrun(torch.device("cpu")) as ranks:

        def say(line: str) -> None:
            if ranks.main:
                print(line, file=sys.stderr, flush=True)

        batch, timed = timed_batch(config, ranks.world), words
        if batch != config.train.batch_size:
            timed = (*words, f"train.batch_size={batch}")
            say(f"timing steps of {batch} {config.model.modality} instead of {config.train.batch_size}")
        result = search(
            axes(replace(config, train=replace(config.train, batch_size=batch)), cuda, ranks.world, fixed),
            lambda settings, limit: candidate.run(timed, settings, limit, ranks),
            budget,
            ranks,
            say,
            rate,
        )
    if ranks.main:
        print(*lines(result, rate), sep="\n")
        tuned_file.write(out, result, shlex.join(("unite-fast", "tune", *words)), rate)
        print(f"{out}: try unite-fast train {shlex.join(words)} --tuned {out}")
