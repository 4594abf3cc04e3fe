"""The command that finds the fastest settings for this machine."""

from pathlib import Path
from typing import Annotated

import typer

from unite_fast.commands.options import check_finite

app = typer.Typer()


@app.command()
def tune(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="a YAML file, or the name of a recipe in the package")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="fixed settings, which are not tuned")
    ] = None,
    budget: Annotated[float, typer.Option(min=1, callback=check_finite, help="seconds to spend")] = 180.0,
    out: Annotated[Path, typer.Option(metavar="FILE", help="file for the fastest settings")] = Path("tuned.yaml"),
) -> None:
    """Find the fastest settings for this machine: kernels, compilation, attention, micro-batch, threads, sharding.
    Runs alone or under torchrun.

    Each candidate is a short `unite-fast bench` in its own process, so one that runs out of memory does not end the
    search. The settings are tuned one after another, not in all combinations. Results change only by rounding.

    Examples:

    `unite-fast tune imagenet256_b --budget 600`

    `unite-fast train imagenet256_b --tuned tuned.yaml`
    """
    from unite_fast.benchmarking.run import tune as run

    run(recipe, tuple(overrides or ()), budget, out)
