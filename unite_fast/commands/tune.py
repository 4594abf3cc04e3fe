"""Find what is fastest here."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def tune(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="a YAML file, or a recipe that ships")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="settings; those given here are not tried")
    ] = None,
    budget: Annotated[float, typer.Option(min=1, help="seconds")] = 180.0,
    out: Annotated[Path, typer.Option(metavar="FILE", help="gets the settings that won")] = Path("tuned.yaml"),
) -> None:
    """Find the settings with which this machine computes the same fastest: kernels, compilation, attention,
    micro-batch, threads, sharding. Alone or under torchrun.

    Each candidate is a short `unite-fast bench` in a process of its own, so that it may run out of memory. One setting
    after another is tried, not all combinations. What is computed stays the same up to rounding.

    Examples:

    `unite-fast tune imagenet256_b --budget 600`

    `unite-fast train imagenet256_b --tuned tuned.yaml`
    """
    from unite_fast.benchmarking.run import tune as run

    run(recipe, tuple(overrides or ()), budget, out)
