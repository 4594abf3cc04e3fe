"""The command that predicts memory, speed and cost of a run."""

from typing import Annotated

import typer

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
    price: Annotated[float, typer.Option(min=0, help="EUR per GPU and hour; 0: no costs")] = 0.0,
    data: Annotated[str, typer.Option(help="format of the training data: folder, original, cropped-jpeg or raw")] = "",
) -> None:
    """Predict memory, speed, communication and cost of a run on any GPUs; none is needed.

    Examples:

    `unite-fast plan imagenet256_b --gpu h200`

    `unite-fast plan imagenet256_l --gpu h100 --nodes 8 --price 2.5 train.micro_batch=16`
    """
    from unite_fast.planning.gpus import find_gpu
    from unite_fast.planning.predict import Cluster, make_plan
    from unite_fast.planning.report import lines
    from unite_fast.recipes import load_config

    config = load_config(recipe, tuple(overrides or ()))
    for line in lines(make_plan(config, Cluster(find_gpu(gpu), nodes, gpus_per_node), data), price):
        typer.echo(line)
