"""The command that times the trainer."""

from pathlib import Path
from typing import Annotated

import typer

from unite_fast.commands.options import BENCH_TABLE, check_finite
from unite_fast.errors import UserError

app = typer.Typer()


@app.command()
def bench(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE [key=value ...]", help="a recipe and changed settings")
    ] = None,
    data: Annotated[
        str, typer.Option(metavar="PATH", help="folder or shards to read [default: synthetic images]")
    ] = "",
    warmup: Annotated[int, typer.Option(min=1, max=10**6, help="untimed steps before; the first one compiles")] = 5,
    steps: Annotated[int, typer.Option(min=1, max=10**6, help="timed steps")] = 20,
    seconds: Annotated[
        float,
        typer.Option(min=0, callback=check_finite, help="time limit for the timed steps (at least one runs); 0: none"),
    ] = 0.0,
    profile: Annotated[bool, typer.Option("--profile", help="list the slowest kernels")] = False,
    tuned: Annotated[str, typer.Option(metavar="FILE", help="settings found by unite-fast tune")] = "",
    json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
    csv: Annotated[str, typer.Option(metavar="FILE", help="table to append the result to; empty: none")] = BENCH_TABLE,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="plot the table's images/s; without RECIPE nothing is timed")
    ] = None,
) -> None:
    """Time the trainer on this machine, alone or under torchrun: images/s, parts of a step, MFU, memory.

    It trains in a temporary folder and deletes it. Images are synthetic unless --data is set. Without LPIPS weights,
    random ones take their place; the work is the same.

    Examples:

    `unite-fast bench imagenet256_b train.micro_batch=64 --profile`

    `torchrun --nproc-per-node 8 -m unite_fast bench imagenet256_b --data shards/train`

    `unite-fast bench --plot bench.png`
    """
    from unite_fast.benchmarking.run import bench as run
    from unite_fast.benchmarking.run import draw, read_recipe
    from unite_fast.utils.files import check_target

    table = Path(csv) if csv else None
    if plot is not None:
        if plot.suffix != ".png":
            raise UserError(f"--plot is {plot}: it must end in .png")
        check_target(plot, (".png",))
    if plot is not None and table is None:
        raise UserError("--plot plots the table of --csv, but --csv is empty: give a file")
    words = arguments or []
    if not words and plot is None:
        raise UserError("RECIPE is missing: unite-fast bench RECIPE, for example imagenet256_b")
    if words:
        config, overrides = read_recipe(words, tuned, data)
        run(config, overrides, data, warmup, steps, seconds, profile, table, json)
    if plot is not None:
        assert table is not None  # checked above
        draw(table, plot)
