"""The command that trains."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE] [key=value ...]", help="a recipe and changed settings")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="resume from the run folder's latest checkpoint")] = False,
    tuned: Annotated[str, typer.Option(metavar="FILE", help="settings found by unite-fast tune")] = "",
    allow_change: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="data: resume although the training data changed")
    ] = None,
) -> None:
    """Train a recipe: a YAML file, or the name of a recipe in the package (default: digits).

    Examples:

    `unite-fast train`

    `unite-fast train fashion_mnist data.path=FOLDER train.out=runs/shirts`

    `unite-fast train my.yaml train.steps=20000 model.encoder.preset=L --resume`
    """
    from unite_fast.distributed.process_group import Ranks
    from unite_fast.distributed.signals import exit_status
    from unite_fast.errors import require, require_choice
    from unite_fast.recipes import length_note, load_config
    from unite_fast.training.data_record import KEY
    from unite_fast.training.trainer import train as run

    allowed = tuple(allow_change or ())
    for key in allowed:
        require_choice("--allow-change", key, (KEY,))
    require(resume or not allowed, "--allow-change is for resuming a run: add --resume")
    words = arguments or []
    recipe = words[0] if words and ("=" not in words[0] or Path(words[0]).is_file()) else None
    config = load_config(recipe, tuple(words[1:] if recipe else words), tuned)
    note = length_note(recipe, config)
    if note and Ranks.from_environment().main:
        typer.echo(note)
    outcome = run(config, resume, allowed)
    raise typer.Exit(exit_status(outcome.stopped_by))
