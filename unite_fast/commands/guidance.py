"""The best guidance for a model."""

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
    Precision,
    Reference,
    Seed,
    Solver,
    Steps,
    given,
    load,
    parse_range,
)
from unite_fast.config import INCEPTION_SHA256, SEARCH_SAMPLES, EvaluationSettings

app = typer.Typer()

Range = "START:STOP:STEP or a list such as 1,1.5,2"


@app.command()
def search_guidance(
    checkpoint: Checkpoint,
    features: Features = "auto",
    inception: Inception = "",
    inception_sha256: InceptionSha256 = INCEPTION_SHA256,
    reference: Reference = "",
    data: Data = "",
    scales: Annotated[str, typer.Option(help=f"guidance scales: {Range}")] = "1:5:0.2",
    lows: Annotated[str, typer.Option(help="lower ends of the interval, in the same form")] = "0:0.4:0.1",
    highs: Annotated[str, typer.Option(help="upper ends of the interval")] = "0.8:1:0.1",
    count: Annotated[int | None, typer.Option(help="samples a candidate [default: 5,000; with pixels 500]")] = None,
    final_count: Annotated[
        int | None, typer.Option(help="samples to confirm with [default: 50,000; with pixels 2,000]")
    ] = None,
    confirm: Annotated[int, typer.Option(min=1, help="candidates to confirm")] = 3,
    solver: Solver = None,
    steps: Steps = None,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(min=1, help="images at a time")] = 128,
    precision: Precision = None,
    compile: Compile = None,
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="for JSON, table and curves [default: RUN/guidance]")
    ] = None,
) -> None:
    """Find the guidance scale and interval with the smallest Frechet distance: coarse to fine on few samples, the same
    noise for all; then the best few, and no guidance, on many.

    The same command goes on where a killed one stopped; under torchrun the processes share the work.

    Examples:

    `unite-fast search-guidance runs/digits`

    `torchrun --nproc-per-node 8 -m unite_fast search-guidance runs/imagenet256_b --reference in256.npz`
    """
    from unite_fast.distributed.launch import ranks_of_torchrun
    from unite_fast.evaluation import guidance_report
    from unite_fast.evaluation.evaluator import open_evaluator
    from unite_fast.evaluation.guidance_search import Grid, Objective, SearchSettings, search
    from unite_fast.evaluation.report import check_folder, default_folder
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
    ranges = (("--scales", scales), ("--lows", lows), ("--highs", highs))
    grid = Grid(*(parse_range(option, text) for option, text in ranges))
    folder = out or default_folder(checkpoint).with_name("guidance")
    check_folder(folder)
    with ranks_of_torchrun(choose_device(device)) as ranks:
        model = load(checkpoint, device)
        evaluator = open_evaluator(model.config, settings, ranks, model.network.device, track, classifier=False)
        few, many = SEARCH_SAMPLES[evaluator.features.name]
        search_settings = SearchSettings(
            model.config.sampling.changed(**given(solver=solver, steps=steps)),
            few if count is None else count,
            many if final_count is None else final_count,
            seed,
            batch,
            precision or model.config.train.precision,
            model.network.device.type == "cuda" if compile is None else compile,
        )
        objective = Objective(model, evaluator, search_settings, folder, ranks, track, str(checkpoint))
        found = search(grid, objective, confirm)
        if ranks.main:
            guidance_report.save(found, grid, objective, folder)
            for line in guidance_report.lines(found, grid, objective):
                typer.echo(line)
            typer.echo(f"all of it in {folder}")
