"""Commands that describe, export and convert checkpoints, and compare with the authors' code."""

from pathlib import Path
from typing import Annotated

import typer

from unite_fast.commands import options

app = typer.Typer()


@app.command()
def info(checkpoint: options.Checkpoint) -> None:
    """Describe a checkpoint: step, size, settings.

    Example: `unite-fast info runs/digits`
    """
    from unite_fast.checkpoint.model_file import describe

    typer.echo(describe(checkpoint))


@app.command()
def export(
    checkpoint: options.Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="the file to write")],
) -> None:
    """Write a checkpoint's EMA weights and settings to one file.

    Every command that reads a checkpoint reads this file too, except `train --resume`.

    Example: `unite-fast export runs/digits digits.safetensors`
    """
    from unite_fast.checkpoint.model_file import export_model

    export_model(checkpoint, out)
    typer.echo(f"{out}: try unite-fast sample {out}")


@app.command()
def import_official(
    file: Annotated[Path, typer.Argument(metavar="FILE.pt", help="a checkpoint of the authors' code")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the model file to write (.safetensors)")],
    weights: Annotated[str, typer.Option(help="the weights to take: ema or model")] = "ema",
    decoder_heads: Annotated[
        int | None, typer.Option(help="attention heads of the decoder [default: width / 64]")
    ] = None,
    in_context_start: Annotated[int, typer.Option(help="first block that sees the in-context tokens")] = 4,
) -> None:
    """Convert a checkpoint of the authors' code to a model file of unite_fast.

    Example: `unite-fast import-official unite_xl.pt unite_xl.safetensors`
    """
    from unite_fast.interop.official import import_official as run

    run(file, out, weights=weights, decoder_heads=decoder_heads, in_context_start=in_context_start)
    typer.echo(f"{out}: try unite-fast info {out}")


@app.command()
def export_official(
    checkpoint: options.Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT.pt", help="the file to write")],
) -> None:
    """Convert a checkpoint to the format of the authors' code (model and ema).

    Example: `unite-fast export-official runs/imagenet256_b unite_b.pt`
    """
    from unite_fast.interop.official import export_official as run

    run(checkpoint, out)
    typer.echo(str(out))


@app.command()
def parity(
    trace: Annotated[Path, typer.Argument(metavar="TRACE.npz", help="a trace recorded from the released code")],
    backend: Annotated[str, typer.Option(help="the backend of our kernels: reference, native or triton")] = "reference",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "cpu",
) -> None:
    """Compare this implementation with every quantity of a trace; exits with 1 if one exceeds its tolerance.

    Examples:

    `unite-fast parity tests/data/official_tiny_a.npz`

    `unite-fast parity tests/data/official_tiny_a.npz --device cuda --backend triton`
    """
    from unite_fast.interop.parity import run
    from unite_fast.utils.device import choose_device

    if not run(trace, backend, choose_device(device)):
        raise typer.Exit(1)
