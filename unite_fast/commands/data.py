"""Commands that make and verify shards, and inspect data."""

import os
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from unite_fast.commands import options
from unite_fast.config import MOST_WORKERS

app = typer.Typer()


class _MakeByDefault(TyperGroup):
    """`unite-fast shards SOURCE OUT` is `unite-fast shards make SOURCE OUT`."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["make", *args]
        return super().parse_args(ctx, args)


shards = typer.Typer(cls=_MakeByDefault, no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(shards, name="shards")


@shards.callback()
def shards_help() -> None:
    """Make shards and verify them. Images load many times faster from shards.

    Examples:

    `unite-fast shards imagenet/train shards/train --format raw --workers 32`

    `unite-fast shards verify shards/train`
    """


@shards.command("make")
def make_shards(
    source: Annotated[Path, typer.Argument(help="class folders, tar files (ImageNet's) or Parquet files")],
    out: Annotated[Path, typer.Argument(help="folder for the shards; an interrupted run resumes there")],
    format: Annotated[
        str, typer.Option(help="original (unchanged files), cropped-jpeg or raw (cropped pixels)")
    ] = "raw",
    image_size: Annotated[int, typer.Option(help="side of the cropped images, pixels")] = 256,
    quality: Annotated[
        int | None, typer.Option(help="JPEG quality of cropped-jpeg, 95 to 100 [default: 95]", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the shuffle")] = 0,
    per_shard: Annotated[int, typer.Option(help="images per shard")] = 5000,
    split: Annotated[
        str, typer.Option(help="train, val or test, if SOURCE has splits; docs/data.md has their names")
    ] = "train",
    labels: Annotated[
        Path | None,
        typer.Option(
            help="classes of images that lie in no class folders: one per line, ordered by file name, or lines of "
            "image and class, such as LOC_val_solution.csv"
        ),
    ] = None,
    image_column: Annotated[
        str, typer.Option(help="column of Parquet files with the images [default: image, img, ...]")
    ] = "",
    label_column: Annotated[
        str, typer.Option(help="column of Parquet files with the classes [default: label, labels, ...]")
    ] = "",
    workers: Annotated[int, typer.Option(min=1, max=MOST_WORKERS, help="number of processes")] = os.cpu_count() or 1,
) -> None:
    """Make WebDataset shards, an index for DALI beside each, and the manifest dataset.json.

    Examples:

    `unite-fast shards make imagenet/train shards/train --format raw`

    `unite-fast shards make ILSVRC2012_img_train.tar shards/train --format original --workers 32`

    `unite-fast shards make ILSVRC2012_img_val.tar shards/val --labels LOC_val_solution.csv`
    """
    from unite_fast.data_pipeline.shards.parquet_files import Columns
    from unite_fast.data_pipeline.shards.write import SKIPPED_LOG, Settings
    from unite_fast.data_pipeline.shards.write import make_shards as run

    settings = Settings(format, image_size, quality, seed, per_shard)
    columns = Columns(image_column, label_column) if image_column or label_column else None
    manifest = run(source, out, settings, workers, split, labels, columns, typer.echo)
    typer.echo(f"{manifest.samples} images in {len(manifest.shards)} shards of format {format} in {out}")
    if manifest.skipped:
        typer.echo(f"{manifest.skipped} broken images were skipped; {out / SKIPPED_LOG} lists them")


@shards.command("verify")
def verify_shards(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of the shards")],
    workers: Annotated[int, typer.Option(min=1, max=MOST_WORKERS, help="number of threads")] = os.cpu_count() or 1,
) -> None:
    """Check every byte of a shard set, its indices and its manifest; exits with 1 if something is wrong.

    Example: `unite-fast shards verify shards/train`
    """
    from unite_fast.data_pipeline.shards.verify import unchecked
    from unite_fast.data_pipeline.shards.verify import verify_shards as run

    faults = run(folder, workers)
    for fault in faults:
        typer.echo(fault)
    if faults:
        raise typer.Exit(1)
    typer.echo(f"{folder}: every shard matches the manifest")
    for line in unchecked(folder):
        typer.echo(f"not checked, since an earlier version made the set: {line}")


@app.command()
def inspect(
    data: options.DataPath,
    image_size: options.ImageSize = 0,
    split: options.Split = "train",
    workers: Annotated[int, typer.Option(min=0, max=MOST_WORKERS, help="workers of each loader")] = 2,
    seconds: Annotated[float, typer.Option(min=0, max=3600, help="seconds to time each loader")] = 5.0,
    seed: Annotated[int, typer.Option(help="seed of the image order in the grid")] = 0,
    out: Annotated[Path, typer.Option(help="a .png: the first images of a run")] = Path("inspect.png"),
) -> None:
    """Count the images, show some as the model sees them, and time the loaders.

    Example: `unite-fast inspect shards/train --workers 8`
    """
    from unite_fast.data_pipeline.inspection import inspect_data
    from unite_fast.utils.files import check_target

    check_target(out, (".png",), (data,))
    for line in inspect_data(data, image_size, split, workers, seconds, seed, out):
        typer.echo(line)
