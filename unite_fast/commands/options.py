"""Options and arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from unite_fast.config import SOLVERS
from unite_fast.errors import UserError

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT", help="a run's folder for its latest checkpoint, a checkpoint, or a model file")
]
Guidance = Annotated[float | None, typer.Option(help="guidance scale; 1 is unguided [default: the recipe's]")]
Interval = Annotated[str | None, typer.Option(metavar="LOW,HIGH", help="times in which guidance acts")]
Solver = Annotated[str | None, typer.Option(help=" or ".join((", ".join(SOLVERS[:-1]), SOLVERS[-1])))]
Steps = Annotated[int | None, typer.Option(help="steps of euler, heun and multistep")]
Classes = Annotated[str, typer.Option(help="classes to draw in turn, e.g. 3,1,4; all by default")]
Seed = Annotated[int, typer.Option(help="what the noise is drawn from")]
Batch = Annotated[int, typer.Option(help="images at a time")]
Precision = Annotated[str | None, typer.Option(help="bfloat16 or float32 [default: what the model was trained in]")]
Compile = Annotated[bool | None, typer.Option("--compile/--eager", help="compile the network [default: on CUDA]")]
Features = Annotated[str, typer.Option(help="inception (FID), pixels (small images, no weights needed) or auto")]
Inception = Annotated[
    str, typer.Option(metavar="PATH", help="torch-fidelity's Inception weights [default: $UNITE_FAST_INCEPTION]")
]
InceptionSha256 = Annotated[str, typer.Option(help="what the SHA-256 of other weights starts with", show_default=False)]
Reference = Annotated[
    str, typer.Option(metavar="REF.npz", help="statistics of real images [default, pixels: the training images]")
]
Data = Annotated[str, typer.Option(help="folder of the data, if not the one trained on")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto")]


def load(checkpoint: Path, device: str):
    from unite_fast import load
    from unite_fast.utils.device import choose_device, use_threads

    model = load(checkpoint, choose_device(device))
    use_threads(model.config.train.threads)
    return model


def given(**settings) -> dict:
    return {name: value for name, value in settings.items() if value is not None}


def parse_interval(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--interval is LOW,HIGH, for example 0.1,1; got {text!r}") from error
    return low, high


def parse_numbers(option: str, text: str, kind: type) -> list:
    """The numbers of "1,2.5"."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} is a list of numbers such as 1,3; got {text!r}") from error


def parse_classes(text: str) -> list[int]:
    """The classes of "3,1,4"; empty: all, an empty list."""
    return parse_numbers("--classes", text, int) if text else []


def parse_range(option: str, text: str) -> list[float]:
    """The numbers of "1:5:0.2", its ends included, or of a list."""
    if ":" not in text:
        return parse_numbers(option, text, float)
    try:
        start, stop, step = (float(part) for part in text.split(":"))
        # Rounding must neither make 1 + 2 * 0.2 another number than 1.4 nor lose the last one.
        return [round(start + i * step, 10) for i in range(int((stop - start) / step + 1e-6) + 1)]
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{option} is START:STOP:STEP, for example 1:5:0.2, or a list; got {text!r}") from error
