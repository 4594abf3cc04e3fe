"""Options and arguments that several commands share, and how they become settings."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from unite_fast.config import SOLVERS
from unite_fast.errors import UserError, require, shown

Number = TypeVar("Number", int, float)

MOST_NUMBERS = 1_000
"""Numbers that a list or a range may have."""
BENCH_TABLE = "runs/bench.csv"
"""The table that `bench` writes and `plan` reads by default."""


def check_finite(parameter: typer.CallbackParam, value: float) -> float:
    """The callback of options that are numbers: no nan, no infinity, which pass click's own bounds."""
    require(math.isfinite(value), f"--{parameter.name} is {value}; it must be a finite number")
    return value


Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT", help="a run folder (its latest checkpoint), a checkpoint, or an exported model file"
    ),
]
DataPath = Annotated[
    str,
    typer.Argument(
        metavar="DATA", help="folder or address of the data, or digits (write ./digits for a folder of that name)"
    ),
]
Data = Annotated[str, typer.Option(help="folder of the data, if not the training data")]
Split = Annotated[str, typer.Option(help="train, val or test; docs/data.md has more names")]
ImageSize = Annotated[
    int, typer.Option(min=0, max=2**14, help="side of the images, pixels; 0: the default for the data")
]
Guidance = Annotated[float | None, typer.Option(help="guidance scale; 1 is unguided [default: the recipe's]")]
Interval = Annotated[
    str | None, typer.Option(metavar="LOW,HIGH", help="times between which guidance acts [default: the recipe's]")
]
Solver = Annotated[str | None, typer.Option(help=f"{', '.join(SOLVERS[:-1])} or {SOLVERS[-1]} [default: the recipe's]")]
Steps = Annotated[int | None, typer.Option(help="steps of euler, heun and multistep [default: the recipe's]")]
Classes = Annotated[str, typer.Option(help="classes to cycle through, e.g. 3,1,4 [default: all]")]
Seed = Annotated[int, typer.Option(help="seed of the noise")]
Batch = Annotated[int, typer.Option(help="images per forward pass")]
Precision = Annotated[str | None, typer.Option(help="bfloat16 or float32 [default: as in training]")]
Compile = Annotated[bool | None, typer.Option("--compile/--eager", help="compile the network [default: on CUDA]")]
Features = Annotated[str, typer.Option(help="inception (FID), pixels (small images, no weights needed) or auto")]
Inception = Annotated[
    str, typer.Option(metavar="PATH", help="torch-fidelity's Inception weights [default: $UNITE_FAST_INCEPTION]")
]
InceptionSha256 = Annotated[
    str, typer.Option(help="first digits of the SHA-256, for other Inception weights", show_default=False)
]
Reference = Annotated[
    str,
    typer.Option(metavar="REF.npz", help="statistics of real images [default with pixels: of the training images]"),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto")]


def check_out(out: Path, suffixes: tuple[str, ...], checkpoint: Path, *others: Path) -> None:
    """Check an output, before the work, against what is read: the checkpoint and others; see `check_target`."""
    from unite_fast.checkpoint.folders import checkpoint_files
    from unite_fast.utils.files import check_target

    check_target(out, suffixes, (checkpoint_files(checkpoint), *others))
    if out.exists() and checkpoint.exists() and out.samefile(checkpoint):  # a run folder for a folder of images
        raise UserError(f"{out} is what this command reads; choose another --out")


def load(checkpoint: Path, device: str) -> Any:
    """Load a model of images or molecules (`unite_fast.load`), and set PyTorch's threads as in its training."""
    from unite_fast import load
    from unite_fast.utils.device import choose_device, use_threads

    model = load(checkpoint, choose_device(device))
    use_threads(model.config.train.threads)
    return model


def sampling_changes(
    guidance: float | None = None,
    interval: str | None = None,
    solver: str | None = None,
    steps: int | None = None,
) -> dict:
    """The fields of `SamplingConfig` that the options set."""
    changes = {"guidance": guidance, "interval": parse_interval(interval), "solver": solver, "steps": steps}
    return {name: value for name, value in changes.items() if value is not None}


def parse_interval(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (_finite(part, float) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--interval must be LOW,HIGH, for example 0.1,1; got {shown(text)}") from error
    return low, high


def parse_numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Parse a list of numbers: "1,2.5"."""
    try:
        numbers = [_finite(part, kind) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} must be a list of finite numbers such as 1,3; got {shown(text)}") from error
    require(len(numbers) <= MOST_NUMBERS, f"{option} has {len(numbers):,} numbers; it may have {MOST_NUMBERS:,}")
    return numbers


def _finite(text: str, kind: Callable[[str], Number]) -> Number:
    """A finite number in plain digits: Python also reads 1_0, nan, inf and the digits of other scripts."""
    number = kind(text)
    if not (re.fullmatch(r"[-+0-9.eE]+", text.strip()) and math.isfinite(number)):
        raise ValueError
    return number


def parse_classes(text: str) -> list[int]:
    """Parse a list of classes, "3,1,4"; an empty text gives an empty list, which means all classes."""
    return parse_numbers("--classes", text, int) if text else []


def parse_range(option: str, text: str) -> list[float]:
    """Parse a range with both ends, "1:5:0.2", or a list, "1,1.5,2"."""
    if ":" not in text:
        return parse_numbers(option, text, float)
    try:
        start, stop, step = (_finite(part, float) for part in text.split(":"))
        steps = int((stop - start) / step + 1e-6)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise UserError(
            f"{option} must be START:STOP:STEP, for example 1:5:0.2, or a list; got {shown(text)}"
        ) from error
    require(steps < MOST_NUMBERS, f"{option} has {steps + 1:,} numbers; it may have {MOST_NUMBERS:,}: use larger steps")
    # Rounding errors must neither make 1 + 2 * 0.2 differ from 1.4 nor drop the last number.
    return [round(start + i * step, 10) for i in range(steps + 1)]
