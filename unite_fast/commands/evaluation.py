"""How good a trained model is."""

from pathlib import Path
from typing import Annotated

import typer

from unite_fast.commands.options import (
    Checkpoint,
    Compile,
    Data,
    Device,
    Features,
    Inception,
    InceptionSha256,
    Interval,
    Precision,
    Reference,
    Seed,
    Solver,
    Steps,
    given,
    load,
    parse_interval,
    parse_numbers,
)
from unite_fast.config import INCEPTION_SHA256, EvaluationSettings
from unite_fast.errors import require

app = typer.Typer()


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    features: Features = "auto",
    inception: Inception = "",
    inception_sha256: InceptionSha256 = INCEPTION_SHA256,
    reference: Reference = "",
    data: Data = "",
    count: Annotated[
        int | None, typer.Option(help="generated images a guidance scale [default: 50,000; with pixels 1,000]")
    ] = None,
    guidance: Annotated[
        str, typer.Option(metavar="SCALE[,SCALE...]", help="[default: 1, which is unguided, and the recipe's]")
    ] = "",
    interval: Interval = None,
    solver: Solver = None,
    steps: Steps = None,
    reconstructions: Annotated[
        int | None, typer.Option(min=0, help="held-out images to reconstruct, at most; 0: none [default: 50,000]")
    ] = None,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(min=1, help="images at a time")] = 128,
    precision: Precision = None,
    compile: Compile = None,
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="for JSON, table and grids [default: RUN/evaluation]")
    ] = None,
) -> None:
    """Evaluator a model: generated images against real ones, and reconstructions of held-out images.

    Under torchrun the processes share the work, and the result is the same.

    Examples:

    `unite-fast evaluate runs/digits`

    `torchrun --nproc-per-node 8 -m unite_fast evaluate runs/imagenet256_b --reference in256.npz --guidance 3`
    """
    from unite_fast.distributed.launch import ranks_of_torchrun
    from unite_fast.evaluation.evaluate import evaluate as run
    from unite_fast.evaluation.report import default_folder, lines
    from unite_fast.utils.device import choose_device
    from unite_fast.utils.progress import track

    settings = EvaluationSettings(
        features=features,
        inception=inception,
        inception_sha256=inception_sha256,
        reference=reference,
        data=data,
        count=count or 0,
        guidance=tuple(parse_numbers("--guidance", guidance, float)) if guidance else (),
        sampling=given(interval=parse_interval(interval), solver=solver, steps=steps),
        seed=seed,
        batch=batch,
        precision=precision or "",
        compile=compile,
        **given(reconstructions=reconstructions),
    )
    require(count != 0, "--count is 0; a covariance needs at least 2 images")
    folder = out or default_folder(checkpoint)
    with ranks_of_torchrun(choose_device(device)) as ranks:
        model = load(checkpoint, device)
        result = run(model, settings, folder, str(checkpoint), track)
    if ranks.main:
        for line in lines(result):
            typer.echo(line)
        typer.echo(f"all of it in {folder}")


@app.command()
def stats(
    data: Annotated[str, typer.Argument(metavar="DATA", help="folder or address of data, or digits")],
    out: Annotated[Path, typer.Argument(metavar="OUT.npz", help="the statistics to write")],
    features: Features = "auto",
    inception: Inception = "",
    inception_sha256: InceptionSha256 = INCEPTION_SHA256,
    image_size: Annotated[int, typer.Option(help="side of the images; 0: what suits the data")] = 0,
    split: Annotated[str, typer.Option(help="train or test")] = "train",
    batch: Annotated[int, typer.Option(min=1, help="images at a time")] = 128,
    workers: Annotated[int, typer.Option(min=0, help="threads that read images")] = 2,
    device: Device = "auto",
) -> None:
    """Make reference statistics of real images, for `unite-fast evaluate --reference`.

    Examples:

    `unite-fast stats digits digits.npz`

    `torchrun --nproc-per-node 8 -m unite_fast stats shards/train in256.npz --features inception`
    """
    from unite_fast.distributed.launch import ranks_of_torchrun
    from unite_fast.evaluation.batches import unreadable_lines
    from unite_fast.evaluation.reference import save_statistics
    from unite_fast.utils.device import choose_device
    from unite_fast.utils.progress import track

    settings = EvaluationSettings(
        features=features, inception=inception, inception_sha256=inception_sha256, batch=batch
    )
    with ranks_of_torchrun(choose_device(device)) as ranks:
        made = save_statistics(data, image_size, split, settings, out, ranks, choose_device(device), workers, track)
    if ranks.main:
        typer.echo(f"{made.count} images, {len(made.statistics.mean)} {made.features} features: {out}")
        for line in unreadable_lines(made.provenance, "images"):
            typer.echo(line)
