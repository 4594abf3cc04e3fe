"""The command that checks the hosts before a training."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command("check-cluster")
def check_cluster(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE] [key=value ...]", help="as for unite-fast train")
    ] = None,
    folder: Annotated[str, typer.Option(metavar="FOLDER", help="run folder [default: train.out or runs/NAME]")] = "",
    tuned: Annotated[str, typer.Option(metavar="FILE", help="settings found by unite-fast tune")] = "",
    json: Annotated[Path | None, typer.Option(metavar="FILE.json", help="write all facts to a file")] = None,
) -> None:
    """Check the hosts of a training, under torchrun with the training's flags: names, limits, versions, shared folder,
    clocks, network, disk, data. Takes a minute at most and leaves nothing behind.

    Prints a table by host, errors and warnings. The exit status is 2 if there is an error (torchrun makes it 1).

    Examples:

    `unite-fast check-cluster digits`

    `torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id check --rdzv-endpoint HEAD:29400
    -m unite_fast check-cluster imagenet256_l train.out=/shared/runs/l`
    """
    from unite_fast.cluster_check.run import check_cluster as run
    from unite_fast.recipes import load_config

    words = arguments or []
    recipe = words[0] if words and ("=" not in words[0] or Path(words[0]).is_file()) else None
    raise typer.Exit(run(load_config(recipe, tuple(words[1:] if recipe else words), tuned), folder, json))
