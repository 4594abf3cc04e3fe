"""Time the trainer."""

from pathlib import Path
from typing import Annotated

import typer

from unite_fast.errors import UserError

app = typer.Typer()


@app.command()
def bench(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE [key=value ...]", help="a recipe and settings that differ")
    ] = None,
    data: Annotated[
        str, typer.Option(metavar="PATH", help="read these shards or this folder [default: made-up images]")
    ] = "",
    warmup: Annotated[int, typer.Option(min=1, help="steps before, the first of which compiles")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="timed steps")] = 20,
    seconds: Annotated[
        float, typer.Option(min=0, help="as many of those steps as fit into this time, at least one; 0: all")
    ] = 0.0,
    profile: Annotated[bool, typer.Option("--profile", help="list the kernels that take most time")] = False,
    tuned: Annotated[str, typer.Option(metavar="FILE", help="settings that unite-fast tune found")] = "",
    json: Annotated[bool, typer.Option("--json", help="print one object")] = False,
    csv: Annotated[str, typer.Option(metavar="FILE", help="table that gets a row; empty: none")] = "runs/bench.csv",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="draw the table's images/s; without RECIPE that alone")
    ] = None,
) -> None:
    """Time the real trainer on this machine, alone or under torchrun: images/s, parts of a step, MFU, memory.

    It trains in a temporary folder that is gone afterwards. Images are made up unless --data names some; where no
    weights of LPIPS are given, random ones do the same work.

    Examples:

    `unite-fast bench imagenet256_b train.micro_batch=64 --profile`

    `torchrun --nproc-per-node 8 -m unite_fast bench imagenet256_b --data shards/train`

    `unite-fast bench --plot bench.png`
    """
    from unite_fast.benchmarking.run import bench as run
    from unite_fast.benchmarking.run import draw, read_recipe

    table = Path(csv) if csv else None
    if plot is not None and plot.suffix != ".png":
        raise UserError(f"--plot is {plot}: it must be a .png")
    if plot is not None and table is None:
        raise UserError("--plot draws the table that --csv names, and that is empty")
    words = arguments or []
    if not words and plot is None:
        raise UserError("say which recipe to time: unite-fast bench RECIPE, for example imagenet256_b")
    if words:
        config, overrides = read_recipe(words, tuned, data)
        run(config, overrides, data, warmup, steps, seconds, profile, table, json)
    if plot is not None:
        draw(table, plot)
