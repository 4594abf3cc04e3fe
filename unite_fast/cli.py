"""The command line: thin calls, nothing else."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from unite_fast.errors import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train UNITE, one network that is image tokenizer and latent denoiser, and use it.",
)

Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="a checkpoint, or a run's folder for its latest one")]
Guidance = Annotated[float | None, typer.Option(help="guidance scale; 1 is unguided [default: the recipe's]")]
Interval = Annotated[str | None, typer.Option(metavar="LOW,HIGH", help="times in which guidance acts")]
Solver = Annotated[str | None, typer.Option(help="euler, heun or dopri5")]
Steps = Annotated[int | None, typer.Option(help="steps of euler and heun")]
Seed = Annotated[int, typer.Option(help="what the noise is drawn from")]
Batch = Annotated[int, typer.Option(help="images at a time")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto")]


@app.command()
def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE] [key=value ...]", help="a recipe and settings that differ")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run folder's latest checkpoint")] = False,
) -> None:
    """Train a recipe: a YAML file, or the name of one that ships with the package (default: digits).

    Examples:

    `unite-fast train`

    `unite-fast train fashion_mnist data.path=FOLDER train.out=runs/shirts`

    `unite-fast train my.yaml train.steps=20000 model.encoder.preset=L --resume`
    """
    from unite_fast.recipes import load_config
    from unite_fast.training.trainer import train as run

    words = arguments or []
    recipe = words[0] if words and ("=" not in words[0] or Path(words[0]).is_file()) else None
    outcome = run(load_config(recipe, tuple(words[1:] if recipe else words)), resume)
    if outcome.stopped_by:
        raise typer.Exit(128 + outcome.stopped_by)


@app.command()
def sample(
    checkpoint: Checkpoint,
    classes: Annotated[str, typer.Option(help="classes to draw in turn, e.g. 3,1,4; all by default")] = "",
    count: Annotated[int, typer.Option(min=1, help="how many images")] = 80,
    guidance: Guidance = None,
    interval: Interval = None,
    solver: Solver = None,
    steps: Steps = None,
    seed: Seed = 0,
    batch: Batch = 64,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="a .png (one grid), an .npz (arr_0, uint8 NHWC) or a folder")] = Path(
        "samples.png"
    ),
) -> None:
    """Generate images with the averaged weights.

    Example: `unite-fast sample runs/digits --classes 7 --count 20 --guidance 2 --out sevens.png`
    """
    from unite_fast import outputs

    outputs.check_target(out)
    model = _load(checkpoint, device)
    labels = outputs.choose_labels(classes, count, model.config.model.num_classes)
    settings = _given(guidance=guidance, interval=_interval(interval), solver=solver, steps=steps)
    images = outputs.generate_with_progress(model, labels, seed, batch, settings)
    outputs.save_images(images, labels, out, columns=10)
    typer.echo(f"{len(images)} images in {out}")


@app.command()
def reconstruct(
    checkpoint: Checkpoint,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="picture files")],
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="a .png: originals above reconstructions")] = Path("reconstructions.png"),
) -> None:
    """Send pictures through tokenizer and decoder, and print how well they come back.

    Example: `unite-fast reconstruct runs/imagenet cat.jpg dog.png --out pets.png`
    """
    from unite_fast import outputs

    outputs.check_target(out, (".png",))
    model = _load(checkpoint, device)
    originals = outputs.read_images(images, model.config.model.image_size)
    copies = model.reconstruct(originals)
    for path, decibels in zip(images, outputs.psnr(originals, copies), strict=True):
        typer.echo(f"{path}: {decibels:.2f} dB")
    outputs.save_pairs(originals, copies, out)
    typer.echo(f"{len(images)} pairs in {out}")


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str, typer.Option(help="folder of the data, if not the one trained on")] = "",
    count: Annotated[int, typer.Option(min=1, help="generated images")] = 1000,
    guidance: Annotated[float, typer.Option(help="scale of the guided samples")] = 2.0,
    steps: Steps = None,
    device: Device = "auto",
) -> None:
    """For small images: PSNR of held-out ones, and how many generated ones a classifier names as they were asked for.

    The classifier is a support vector machine on the real pixels.

    Example: `unite-fast evaluate runs/digits`
    """
    from unite_fast.evaluation.small_images import evaluate as run

    for line in run(_load(checkpoint, device), data, count, guidance, _given(steps=steps)):
        typer.echo(line)


@app.command()
def info(checkpoint: Checkpoint) -> None:
    """Say what a checkpoint holds: step, size, settings.

    Example: `unite-fast info runs/digits`
    """
    from unite_fast import outputs

    typer.echo(outputs.describe(checkpoint))


class _MakeByDefault(typer.core.TyperGroup):
    """`unite-fast shards SOURCE OUT` is `unite-fast shards make SOURCE OUT`."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["make", *args]
        return super().parse_args(ctx, args)


shards = typer.Typer(cls=_MakeByDefault, no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(shards, name="shards")


@shards.callback()
def shards_help() -> None:
    """Make shards of images, which are read many times faster, and verify them.

    Examples:

    `unite-fast shards imagenet/train shards/train --format raw --workers 32`

    `unite-fast shards verify shards/train`
    """


@shards.command("make")
def make_shards(
    source: Annotated[Path, typer.Argument(help="class folders, tar files (ImageNet's) or Parquet files")],
    out: Annotated[Path, typer.Argument(help="folder of the shards; an interrupted run goes on there")],
    format: Annotated[str, typer.Option(help="original (the files), cropped-jpeg or raw (cropped pixels)")] = "raw",
    image_size: Annotated[int, typer.Option(help="side of the cropped images")] = 256,
    quality: Annotated[int, typer.Option(help="of cropped JPEGs, 95 to 100")] = 95,
    seed: Annotated[int, typer.Option(help="what the images are shuffled by")] = 0,
    per_shard: Annotated[int, typer.Option(help="images a shard")] = 5000,
    split: Annotated[str, typer.Option(help="train or test, where SOURCE has both")] = "train",
    labels: Annotated[Path | None, typer.Option(help="the class of each image, a line each, by file name")] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes")] = os.cpu_count() or 1,
) -> None:
    """Make WebDataset shards, each with an index for DALI, and a manifest, dataset.json.

    Examples:

    `unite-fast shards make imagenet/train shards/train --format raw`

    `unite-fast shards make ILSVRC2012_img_train.tar shards/train --format original --workers 32`

    `unite-fast shards make ILSVRC2012_img_val.tar shards/val --labels val_synsets.txt`
    """
    from unite_fast.data_pipeline.shards.write import SKIPPED_LOG, Settings
    from unite_fast.data_pipeline.shards.write import make_shards as run

    manifest = run(source, out, Settings(format, image_size, quality, seed, per_shard), workers, split, labels)
    typer.echo(f"{manifest.samples} images in {len(manifest.shards)} shards of format {format} in {out}")
    if manifest.skipped:
        typer.echo(f"{manifest.skipped} broken images were left out: {out / SKIPPED_LOG} names them")


@shards.command("verify")
def verify_shards(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of the shards")],
    workers: Annotated[int, typer.Option(min=1, help="threads")] = os.cpu_count() or 1,
) -> None:
    """Read every byte again and hold it against the manifest; exits with 1 when something is wrong.

    Example: `unite-fast shards verify shards/train`
    """
    from unite_fast.data_pipeline.shards.verify import verify_shards as run

    faults = run(folder, workers)
    for fault in faults:
        typer.echo(fault)
    if faults:
        raise typer.Exit(1)
    typer.echo(f"{folder}: every shard is as it was made")


@app.command()
def inspect(
    data: Annotated[str, typer.Argument(metavar="DATA", help="folder or address of data, or digits")],
    image_size: Annotated[int, typer.Option(help="side of the images; 0: what suits the data")] = 0,
    split: Annotated[str, typer.Option(help="train or test")] = "train",
    workers: Annotated[int, typer.Option(min=0, help="of each loader")] = 2,
    seconds: Annotated[float, typer.Option(help="how long each loader is timed")] = 5.0,
    seed: Annotated[int, typer.Option(help="of the order that the grid follows")] = 0,
    out: Annotated[Path, typer.Option(help="a .png: the first images of a run")] = Path("inspect.png"),
) -> None:
    """Count the images, show some as the model sees them, and time every loader that fits.

    Example: `unite-fast inspect shards/train --workers 8`
    """
    from unite_fast import outputs
    from unite_fast.data_pipeline.inspection import inspect_data

    outputs.check_target(out, (".png",))
    for line in inspect_data(data, image_size, split, workers, seconds, seed, out):
        typer.echo(line)


@app.command()
def import_official(
    file: Annotated[Path, typer.Argument(metavar="FILE.pt", help="a checkpoint of the authors' code")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the .safetensors checkpoint to write")],
    weights: Annotated[str, typer.Option(help="which weights of the file: ema or model")] = "ema",
    decoder_heads: Annotated[int | None, typer.Option(help="heads of the decoder [default: width / 64]")] = None,
    in_context_start: Annotated[int, typer.Option(help="block that in-context tokens enter before")] = 4,
) -> None:
    """Turn a checkpoint of the authors' code into one of ours.

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
) -> None:
    """Compare every quantity of a trace with this implementation; exits with 1 past a tolerance.

    Example: `unite-fast parity tests/data/official_tiny_a.npz`
    """
    from unite_fast.interop.parity import run

    if not run(trace, backend):
        raise typer.Exit(1)


def _load(checkpoint: Path, device: str):
    from unite_fast import load
    from unite_fast.training.trainer import choose_device, use_threads

    model = load(checkpoint, choose_device(device))
    use_threads(model.config.train.threads)
    return model


def _given(**settings) -> dict:
    return {name: value for name, value in settings.items() if value is not None}


def _interval(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--interval is LOW,HIGH, for example 0.1,1; got {text!r}") from error
    return low, high


def main() -> None:
    """Run a command; a user's mistake is one line on stderr and status 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text
    try:
        app()
    except UserError as error:
        sys.exit(_complain(str(error)))
    except OSError as error:
        # A file of the user's that the system refuses: a folder in its place, no permission, a full disk.
        sys.exit(_complain(f"{error.filename or 'a file'}: {error.strerror or error}"))


def _complain(message: str) -> int:
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2
