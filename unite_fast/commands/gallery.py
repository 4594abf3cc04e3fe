"""The command that makes a page of images from a model."""

from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from unite_fast.commands import options

app = typer.Typer()


@app.command()
def gallery(
    checkpoint: options.Checkpoint,
    out: Annotated[Path, typer.Option(help="the .html to write")] = Path("gallery.html"),
    data: options.Data = "",
    real: Annotated[
        bool, typer.Option(help="show real images, their reconstructions and interpolations between them")
    ] = True,
    classes: Annotated[str, typer.Option(help="classes to show, e.g. 3,1,4 [default: some, evenly spaced]")] = "",
    per_class: Annotated[
        int | None, typer.Option(min=1, help="samples per class [default: depends on the image size]")
    ] = None,
    scales: Annotated[str, typer.Option(help="guidance scales to compare")] = "1,1.5,2,3,4,6",
    guidance: options.Guidance = None,
    interval: options.Interval = None,
    solver: options.Solver = None,
    steps: options.Steps = None,
    seed: options.Seed = 0,
    batch: options.Batch = 64,
    device: options.Device = "auto",
) -> None:
    """Show a model in one self-contained HTML page: samples, guidance, reconstructions, interpolations, denoising step
    by step, and training curves.

    Example: `unite-fast gallery runs/digits --out digits.html`
    """
    from unite_fast.evaluation.gallery import GallerySettings, make_gallery
    from unite_fast.evaluation.gallery_page import render
    from unite_fast.utils.files import save_text

    options.check_out(out, (".html",), checkpoint)
    settings = GallerySettings(
        classes=options.parse_classes(classes),
        per_class=per_class,
        scales=tuple(options.parse_numbers("--scales", scales, float)),
        data=data if real else None,
        seed=seed,
        batch=batch,
        sampling=options.sampling_changes(guidance, interval, solver, steps),
    )
    head, sections = make_gallery(options.load(checkpoint, device), checkpoint, settings)
    page = render(head, sections, date.today().isoformat())
    save_text(page, out)
    images = sum(len(figure.images) for section in sections for row in section.rows for figure in row.figures)
    typer.echo(f"{images} images, {len(page.encode()) / 2**20:.1f} MiB, in {out}")
