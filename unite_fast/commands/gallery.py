"""The command that makes a page of images or molecules from a model."""

from dataclasses import replace
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
        bool, typer.Option(help="show real images or molecules, their reconstructions and interpolations between them")
    ] = True,
    classes: Annotated[
        str,
        typer.Option(help="classes to show, e.g. 3,1,4; of molecules numbers of atoms [default: some, evenly spaced]"),
    ] = "",
    per_class: Annotated[
        int | None, typer.Option(min=1, help="samples per class [default: depends on the image size; molecules: 2]")
    ] = None,
    scales: Annotated[
        str | None, typer.Option(help="guidance scales to compare, of images [default: 1,1.5,2,3,4,6]")
    ] = None,
    guidance: options.Guidance = None,
    interval: options.Interval = None,
    solver: options.Solver = None,
    steps: options.Steps = None,
    seed: options.Seed = 0,
    batch: options.Batch = 64,
    device: options.Device = "auto",
) -> None:
    """Show a model in one self-contained HTML page: samples, guidance, reconstructions, interpolations, denoising step
    by step, and training curves. Molecules are drawn in three dimensions.

    Examples:

    `unite-fast gallery runs/digits --out digits.html`

    `unite-fast gallery runs/qm9_tiny --data qm9.npz --out molecules.html`
    """
    from unite_fast.errors import require
    from unite_fast.evaluation.gallery import GallerySettings, make_gallery
    from unite_fast.evaluation.gallery_page import render
    from unite_fast.evaluation.molecules import gallery as molecules
    from unite_fast.evaluation.molecules import gallery_page as molecules_page
    from unite_fast.sampling.molecules import TrainedMolecules
    from unite_fast.utils.files import save_text

    options.check_out(out, (".html",), checkpoint)
    settings = GallerySettings(
        classes=options.parse_classes(classes),
        per_class=per_class,
        data=data if real else None,
        seed=seed,
        batch=batch,
        sampling=options.sampling_changes(guidance, interval, solver, steps),
    )
    if scales is not None:
        settings = replace(settings, scales=tuple(options.parse_numbers("--scales", scales, float)))
    model = options.load(checkpoint, device)
    if isinstance(model, TrainedMolecules):
        for name, value in (("--scales", scales), ("--interval", interval)):
            require(value is None, f"{name} is for images: molecules have no guidance; leave it out")
        head, sections = molecules.make_molecule_gallery(model, checkpoint, settings)
        page = molecules_page.render(head, sections, date.today().isoformat())
        if molecules.HELD_OUT in head:
            typer.echo(f"{molecules.HELD_OUT} {head[molecules.HELD_OUT]}")
    else:
        head, sections = make_gallery(model, checkpoint, settings)
        page = render(head, sections, date.today().isoformat())
    save_text(page, out)
    shown = sum(figure.count for section in sections for row in section.rows for figure in row.figures)
    typer.echo(f"{shown} {model.config.model.modality}, {len(page.encode()) / 2**20:.1f} MiB, in {out}")
