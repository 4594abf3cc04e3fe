"""The command that searches for a model's best guidance."""

from pathlib import Path
from typing import Annotated

import typer

from unite_fast.commands import options
from unite_fast.config import IMAGES
from unite_fast.errors import require
from unite_fast.evaluation.settings import SEARCH_SAMPLES, EvaluationSettings

app = typer.Typer()

INCEPTION, PIXELS = SEARCH_SAMPLES["inception"], SEARCH_SAMPLES["pixels"]
RANGE = "START:STOP:STEP or a list such as 1,1.5,2"


@app.command()
def search_guidance(
    checkpoint: options.Checkpoint,
    features: options.Features = "auto",
    inception: options.Inception = "",
    inception_sha256: options.InceptionSha256 = EvaluationSettings.inception_sha256,
    reference: options.Reference = "",
    data: options.Data = "",
    scales: Annotated[str, typer.Option(help=f"guidance scales: {RANGE}")] = "1:5:0.2",
    lows: Annotated[str, typer.Option(help="lower ends of the interval, likewise")] = "0:0.4:0.1",
    highs: Annotated[str, typer.Option(help="upper ends of the interval, likewise")] = "0.8:1:0.1",
    count: Annotated[
        int | None,
        typer.Option(help=f"samples per candidate [default: {INCEPTION[0]:,}; with pixels {PIXELS[0]:,}]"),
    ] = None,
    final_count: Annotated[
        int | None,
        typer.Option(help=f"samples to confirm a candidate [default: {INCEPTION[1]:,}; with pixels {PIXELS[1]:,}]"),
    ] = None,
    confirm: Annotated[int, typer.Option(min=1, help="number of candidates to confirm")] = 3,
    solver: options.Solver = None,
    steps: options.Steps = None,
    seed: options.Seed = 0,
    batch: options.Batch = EvaluationSettings.batch,
    precision: options.Precision = None,
    compile: options.Compile = None,
    device: options.Device = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="folder for JSON, table and curves [default: RUN/guidance]")
    ] = None,
) -> None:
    """Find the guidance scale and interval with the smallest Frechet distance.

    The search goes from coarse to fine on few samples, with the same noise for all candidates. The best ones and
    unguided sampling are then confirmed on many samples.

    If a search is interrupted, the same command resumes it. torchrun divides the work among processes.

    Examples:

    `unite-fast search-guidance runs/digits`

    `torchrun --nproc-per-node 8 -m unite_fast search-guidance runs/imagenet256_b --reference in256.npz`
    """
    from unite_fast.distributed.launch import ranks_of_torchrun
    from unite_fast.evaluation import guidance_report
    from unite_fast.evaluation.evaluator import open_evaluator
    from unite_fast.evaluation.guidance_search import Grid, Objective, SearchSettings, search
    from unite_fast.evaluation.report import default_folder, report_folder
    from unite_fast.utils.device import choose_device
    from unite_fast.utils.progress import track

    settings = EvaluationSettings(
        features=features,
        inception=inception,
        inception_sha256=inception_sha256,
        reference=reference,
        data=data,
        batch=batch,
    )
    grid = Grid(
        options.parse_range("--scales", scales),
        options.parse_range("--lows", lows),
        options.parse_range("--highs", highs),
    )
    default = default_folder(checkpoint).with_name("guidance")
    folder = out or default
    with ranks_of_torchrun(choose_device(device)) as ranks:
        model = options.load(checkpoint, device)
        require(
            model.config.model.modality == IMAGES,
            f"{checkpoint} is a model of molecules: their class is their number of atoms, which is always given, so "
            "there is no guidance to search; unite-fast evaluate scores it",
        )
        with report_folder(folder, default, guidance_report.FILES, checkpoint, ranks):
            evaluator = open_evaluator(model.config, settings, ranks, model.network.device, track, classifier=False)
            few, many = SEARCH_SAMPLES[evaluator.features.name]
            search_settings = SearchSettings(
                model.config.sampling.changed(**options.sampling_changes(solver=solver, steps=steps)),
                few if count is None else count,
                many if final_count is None else final_count,
                seed,
                batch,
                *model.precision_and_compile(precision, compile),
            )
            objective = Objective(model, evaluator, search_settings, folder, ranks, track, str(checkpoint))
            result = search(grid, objective, confirm)
            if ranks.main:
                guidance_report.save(result, grid, objective, folder)
                for line in guidance_report.lines(result, grid, objective):
                    typer.echo(line)
                typer.echo(f"everything is in {folder}")
