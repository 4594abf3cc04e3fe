"""A page of pictures from a trained model."""

from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from unite_fast.commands.options import (
    Batch,
    Checkpoint,
    Data,
    Device,
    Guidance,
    Interval,
    Seed,
    Solver,
    Steps,
    given,
    load,
    parse_classes,
    parse_interval,
    parse_numbers,
)

app = typer.Typer()


@app.command()
def gallery(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="the .html to write")] = Path("gallery.html"),
    data: Data = "",
    real: Annotated[bool, typer.Option(help="show real images, their reconstructions and what lies between")] = True,
    classes: Annotated[str, typer.Option(help="classes to show, e.g. 3,1,4; by default some, evenly spread")] = "",
    per_class: Annotated[int | None, typer.Option(min=1, help="samples a class [default: by image size]")] = None,
    scales: Annotated[str, typer.Option(help="guidance scales of the ladder")] = "1,1.5,2,3,4,6",
    guidance: Guidance = None,
    interval: Interval = None,
    solver: Solver = None,
    steps: Steps = None,
    seed: Seed = 0,
    batch: Batch = 64,
    device: Device = "auto",
) -> None:
    """Show what a model can do in one HTML page, which needs nothing else and no network: samples, guidance,
    reconstructions, what lies between two images and two noises, denoising step by step, curves of the training.

    Example: `unite-fast gallery runs/digits --out digits.html`
    """
    from unite_fast.evaluation.gallery import GallerySettings, make_gallery
    from unite_fast.evaluation.gallery_page import render
    from unite_fast.utils.files import check_target, save_text

    check_target(out, (".html",))
    settings = GallerySettings(
        classes=parse_classes(classes),
        per_class=per_class,
        scales=tuple(parse_numbers("--scales", scales, float)),
        data=data if real else None,
        seed=seed,
        batch=batch,
        sampling=given(guidance=guidance, interval=parse_interval(interval), solver=solver, steps=steps),
    )
    head, sections = make_gallery(load(checkpoint, device), checkpoint, settings)
    page = render(head, sections, date.today().isoformat())
    save_text(page, out)
    images = sum(len(figure.images) for section in sections for row in section.rows for figure in row.figures)
    typer.echo(f"{images} images, {len(page.encode()) / 2**20:.1f} MiB, in {out}")
