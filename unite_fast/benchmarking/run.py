"""`unite-fast bench`: reads its recipe, measures, says and notes what was found."""

import json
from dataclasses import replace
from pathlib import Path

from unite_fast.benchmarking import csv_file, figures, plot
from unite_fast.benchmarking.measure import Window, measure
from unite_fast.config import Config
from unite_fast.data_pipeline.inspection import open_data
from unite_fast.errors import UserError
from unite_fast.ranks import Ranks
from unite_fast.recipes import load_config


def read_recipe(words: list[str], tuned: str, data: str) -> tuple[Config, tuple[str, ...]]:
    """The recipe with what its images are replaced, and the settings that were given with it.

    Args:
        words: recipe, then key=value.
        tuned: a file of `unite-fast tune`, or empty.
        data: path of the images; empty: made-up ones.

    Raises:
        UserError: no such recipe, setting or data.
    """
    recipe, overrides = words[0], tuple(words[1:])
    if "=" in recipe and not Path(recipe).is_file():
        raise UserError(f"say which recipe to time before the settings: unite-fast bench RECIPE {recipe}")
    for override in overrides:
        if override.startswith(("data.source=", "data.path=")):
            raise UserError(f"{override}: bench makes its images up, or reads those of --data PATH; leave this out")
    config = load_config(recipe, overrides, tuned)
    kind = open_data(data, config.model.image_size, "train")[0] if data else "synthetic"
    # Another source may want another loader, so the recipe's holds for its own alone.
    loader = config.data.loader if data else "auto"
    return replace(config, data=replace(config.data, source=kind, path=data, loader=loader)), overrides


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
    """Measure; the main process prints the figures and adds them to the table."""
    window = Window(warmup, steps, seconds, profile)
    if table is not None and table.exists():
        csv_file.read(table)  # what is wrong with it, before minutes are spent
    measured = measure(config, window)
    if not measured.ranks.main:
        return
    row = figures.row(config, measured, window, data or "synthetic", overrides)
    if as_json:
        top = {"top_kernels": measured.top} if profile else {}
        print(json.dumps(row | top, indent=1))
    else:
        print(*figures.lines(row, measured.top), sep="\n")
    # After they were printed: a full disk must not take them along.
    if table is not None:
        csv_file.append(table, row)
        if not as_json:
            print(f"row added      {table}")


def draw(table: Path, out: Path) -> None:
    if Ranks.of_environment().main:
        count = plot.draw(table, out)
        print(f"{count} measurements of {table} in {out}")
