"""Commands that evaluate a model."""

from pathlib import Path
from typing import Annotated

import typer

from unite_fast.commands import options
from unite_fast.config import MOST_WORKERS
from unite_fast.evaluation.settings import EVALUATION_SAMPLES, EvaluationSettings

app = typer.Typer()


@app.command()
def evaluate(
    checkpoint: options.Checkpoint,
    features: options.Features = "auto",
    inception: options.Inception = "",
    inception_sha256: options.InceptionSha256 = EvaluationSettings.inception_sha256,
    reference: options.Reference = "",
    data: options.Data = "",
    count: Annotated[
        int | None,
        typer.Option(
            help=f"generated images per guidance scale [default: {EVALUATION_SAMPLES['inception']:,}; "
            f"with pixels {EVALUATION_SAMPLES['pixels']:,}], or molecules [default: 1,000]"
        ),
    ] = None,
    guidance: Annotated[
        str, typer.Option(metavar="SCALE[,SCALE...]", help="guidance scales [default: 1 (unguided) and the recipe's]")
    ] = "",
    interval: options.Interval = None,
    solver: options.Solver = None,
    steps: options.Steps = None,
    reconstructions: Annotated[
        int, typer.Option(min=0, help="maximum number of held-out images to reconstruct; 0: none")
    ] = EvaluationSettings.reconstructions,
    seed: options.Seed = 0,
    batch: options.Batch = EvaluationSettings.batch,
    precision: options.Precision = None,
    compile: options.Compile = None,
    device: options.Device = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="folder for JSON, table and grids [default: RUN/evaluation]")
    ] = None,
) -> None:
    """Evaluate a model: generated images or molecules against real ones, and reconstructions of held-out ones.

    torchrun divides the work among processes; the result is the same.

    Examples:

    `unite-fast evaluate runs/digits`

    `torchrun --nproc-per-node 8 -m unite_fast evaluate runs/imagenet256_b --reference in256.npz --guidance 3`
    """
    from unite_fast.distributed.launch import ranks_of_torchrun
    from unite_fast.evaluation import report
    from unite_fast.evaluation.evaluate import evaluate as evaluate_images
    from unite_fast.evaluation.molecules import report as molecule_report
    from unite_fast.evaluation.molecules.evaluate import evaluate_molecules
    from unite_fast.sampling.molecules import TrainedMolecules
    from unite_fast.utils.device import choose_device
    from unite_fast.utils.progress import track

    settings = EvaluationSettings(
        features=features,
        inception=inception,
        inception_sha256=inception_sha256,
        reference=reference,
        data=data,
        count=count,
        guidance=tuple(options.parse_numbers("--guidance", guidance, float)) if guidance else (),
        sampling=options.sampling_changes(None, interval, solver, steps),
        seed=seed,
        batch=batch,
        precision=precision or "",
        compile=compile,
        reconstructions=reconstructions,
    )
    default = report.default_folder(checkpoint)
    folder = out or default
    with ranks_of_torchrun(choose_device(device)) as ranks:
        model = options.load(checkpoint, device)
        of_molecules = isinstance(model, TrainedMolecules)
        run, kind = (evaluate_molecules, molecule_report) if of_molecules else (evaluate_images, report)
        with report.report_folder(folder, default, kind.FILES, checkpoint, ranks):
            result = run(model, settings, folder, str(checkpoint), track)
    if ranks.main:
        for line in kind.lines(result):
            typer.echo(line)
        typer.echo(f"everything is in {folder}")


@app.command()
def stats(
    data: options.DataPath,
    out: Annotated[Path, typer.Argument(metavar="OUT.npz", help="the file to write")],
    features: options.Features = "auto",
    inception: options.Inception = "",
    inception_sha256: options.InceptionSha256 = EvaluationSettings.inception_sha256,
    image_size: options.ImageSize = 0,
    split: options.Split = "train",
    batch: options.Batch = EvaluationSettings.batch,
    workers: Annotated[int, typer.Option(min=0, max=MOST_WORKERS, help="threads that read images")] = 2,
    device: options.Device = "auto",
) -> None:
    """Compute reference statistics of real images for `unite-fast evaluate --reference`.

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
    chosen = choose_device(device)
    with ranks_of_torchrun(chosen) as ranks:
        reference = save_statistics(data, image_size, split, settings, out, ranks, chosen, workers, track)
    if ranks.main:
        of_split = f" ({reference.provenance.get('split', 'unknown split')})"
        dimension = len(reference.statistics.mean)
        typer.echo(f"{reference.count} images{of_split}, {dimension} {reference.features} features: {out}")
        for line in unreadable_lines(reference.provenance, "images"):
            typer.echo(line)
