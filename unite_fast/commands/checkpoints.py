"""What a checkpoint holds, models as single files, and the authors' checkpoints and numbers."""

from pathlib import Path
from typing import Annotated

import typer

from unite_fast.commands.options import Checkpoint

app = typer.Typer()


@app.command()
def info(checkpoint: Checkpoint) -> None:
    """Say what a checkpoint holds: step, size, settings.

    Example: `unite-fast info runs/digits`
    """
    from unite_fast.checkpoint.model_file import describe

    typer.echo(describe(checkpoint))


@app.command()
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="the file to write")],
) -> None:
    """Write a checkpoint's averaged weights, with its settings, as one file.

    Every command that takes a checkpoint, but for `train --resume`, takes such a file.

    Example: `unite-fast export runs/digits digits.safetensors`
    """
    from unite_fast.checkpoint.model_file import export_model

    export_model(checkpoint, out)
    typer.echo(f"{out}: try unite-fast sample {out}")


@app.command()
def import_official(
    file: Annotated[Path, typer.Argument(metavar="FILE.pt", help="a checkpoint of the authors' code")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the model file to write (.safetensors)")],
    weights: Annotated[str, typer.Option(help="which weights of the file: ema or model")] = "ema",
    decoder_heads: Annotated[int | None, typer.Option(help="heads of the decoder [default: width / 64]")] = None,
    in_context_start: Annotated[int, typer.Option(help="block that in-context tokens enter before")] = 4,
) -> None:
    """Turn a checkpoint of the authors' code into a model file of ours.

    Example: `unite-fast import-official unite_xl.pt unite_xl.safetensors`
    """
    from unite_fast.interop.official import import_official as run

    run(file, out, weights=weights, decoder_heads=decoder_heads, in_context_start=in_context_start)
    typer.echo(f"{out}: try unite-fast info {out}")


@app.command()
def export_official(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT.pt", help="the file to write")],
) -> None:
    """Turn a checkpoint of ours into one with the authors' names (model and ema).

    Example: `unite-fast export-official runs/imagenet256_b unite_b.pt`
    """
    from unite_fast.interop.official import export_official as run

    run(checkpoint, out)
    typer.echo(str(out))


@app.command()
def parity(
    trace: Annotated[Path, typer.Argument(metavar="TRACE.npz", help="numbers that the released code produced")],
    backend: Annotated[str, typer.Option(help="which body of the kernels computes ours")] = "reference",
    device: Annotated[str, typer.Option(help="where: cpu, cuda or auto")] = "cpu",
) -> None:
    """Compare every quantity of a trace with this implementation; exits with 1 past a tolerance.

    Examples:

    `unite-fast parity tests/data/official_tiny_a.npz`

    `unite-fast parity tests/data/official_tiny_a.npz --device cuda --backend triton`
    """
    from unite_fast.interop.parity import run
    from unite_fast.utils.device import choose_device

    if not run(trace, backend, choose_device(device)):
        raise typer.Exit(1)
