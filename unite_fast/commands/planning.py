"""The command that predicts memory, speed and cost of a run."""

from pathlib import Path
from typing import Annotated

import typer

from unite_fast.commands.options import BENCH_TABLE, check_finite

app = typer.Typer()


@app.command()
def plan(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="a YAML file, or the name of a recipe in the package")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="changed settings")] = None,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200, l40s, rtx4090, ...")] = "h100",
    nodes: Annotated[int, typer.Option(help="number of machines")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs per machine")] = 8,
    price: Annotated[float, typer.Option(min=0, callback=check_finite, help="EUR per GPU and hour; 0: no costs")] = 0.0,
    data: Annotated[str, typer.Option(help="format of the training data: folder, original, cropped-jpeg or raw")] = "",
    scaling: Annotated[
        bool, typer.Option("--scaling", help="only hours by number of machines, at this batch and with one that grows")
    ] = False,
    measured: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV", help=f"table of unite-fast bench; its rows for this plan are shown [{BENCH_TABLE}]"
        ),
    ] = None,
) -> None:
    """Predict memory, speed, communication and cost of a run on any GPUs; none is needed.

    Examples:

    `unite-fast plan imagenet256_b --gpu h200`

    `unite-fast plan imagenet256_l --gpu h100 --nodes 8 --price 2.5 train.micro_batch=16`

    `unite-fast plan imagenet256_b --gpu h100 --scaling`
    """
    from unite_fast.benchmarking import csv_file
    from unite_fast.planning.gpus import find_gpu, recognise
    from unite_fast.planning.predict import Cluster, make_plan
    from unite_fast.planning.report import lines, scaling_lines
    from unite_fast.recipes import length_note, load_config

    config, card = load_config(recipe, tuple(overrides or ())), find_gpu(gpu)
    note = length_note(recipe, config)
    if scaling:
        for line in (*scaling_lines(config, card, gpus_per_node), *filter(None, [note])):
            typer.echo(line)
        return
    result = make_plan(config, Cluster(card, nodes, gpus_per_node), data)
    if measured is None and Path(BENCH_TABLE).exists():
        measured = Path(BENCH_TABLE)
    rows, left_out = csv_file.measurements(measured, ("images_per_s_per_gpu",)) if measured else ([], "")
    same = {"recipe": config.name, "gpus": str(nodes * gpus_per_node)}
    rows = [row for row in rows if row.items() >= same.items() and recognise(row["card"]) == card]
    for line in (*lines(result, price, rows), *filter(None, (note, left_out))):
        typer.echo(line)
