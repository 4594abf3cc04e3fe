"""Pictures from a trained model."""

from pathlib import Path
from typing import Annotated

import typer

from unite_fast.commands.options import (
    Batch,
    Checkpoint,
    Classes,
    Compile,
    Device,
    Guidance,
    Interval,
    Precision,
    Seed,
    Solver,
    Steps,
    given,
    load,
    parse_classes,
    parse_interval,
)

app = typer.Typer()


@app.command()
def sample(
    checkpoint: Checkpoint,
    classes: Classes = "",
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
    from unite_fast.sampling.sampler import choose_labels
    from unite_fast.utils.files import check_target
    from unite_fast.utils.images import save_images

    check_target(out)
    wanted = parse_classes(classes)
    model = load(checkpoint, device)
    labels = choose_labels(wanted, count, model.config.model.num_classes)
    settings = given(guidance=guidance, interval=parse_interval(interval), solver=solver, steps=steps)
    images = generate_with_progress(model, labels, seed, batch, settings)
    save_images(images, labels, out, columns=10)
    typer.echo(f"{len(images)} images in {out}")


@app.command()
def generate(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="an .npz (arr_0 uint8 NHWC, arr_1 classes) or a folder of PNGs")],
    # torchrun takes --num for an abbreviation of an option of its own.
    num: Annotated[int, typer.Option("--num", "--count", help="how many images")] = 50_000,
    classes: Classes = "",
    guidance: Guidance = None,
    interval: Interval = None,
    solver: Solver = None,
    steps: Steps = None,
    seed: Seed = 0,
    batch: Batch = 64,
    precision: Precision = None,
    compile: Compile = None,
    device: Device = "auto",
) -> None:
    """Generate many images with the averaged weights, for evaluation: by one process, or by several under torchrun. The
    same command goes on where a killed one stopped. Image i depends on the seed, i and its class, not on who draws it.

    Examples:

    `unite-fast generate runs/imagenet256_b --num 50000 --out samples.npz`

    `torchrun --nproc-per-node 8 -m unite_fast generate runs/imagenet256_b --count 50000 --out samples.npz`
    """
    from unite_fast.distributed.launch import ranks_of_torchrun
    from unite_fast.sampling.distributed_sampler import Generation
    from unite_fast.sampling.sample_writer import generate_files
    from unite_fast.sampling.sampler import choose_labels
    from unite_fast.utils.device import choose_device

    settings = given(guidance=guidance, interval=parse_interval(interval), solver=solver, steps=steps)
    wanted = parse_classes(classes)
    with ranks_of_torchrun(choose_device(device)) as ranks:
        model = load(checkpoint, device)
        generation = Generation(
            choose_labels(wanted, num, model.config.model.num_classes),
            model.config.sampling.changed(**settings),
            seed,
            batch,
            precision or model.config.train.precision,
            model.network.device.type == "cuda" if compile is None else compile,
        )
        about = generate_files(model, generation, out, ranks)
    if ranks.main:
        typer.echo(f"{num} images in {out}, what they were made from in {about}")


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
    from unite_fast.data_pipeline.image_folder import read_images
    from unite_fast.evaluation.metrics import psnr
    from unite_fast.utils.files import check_target
    from unite_fast.utils.images import save_pairs

    check_target(out, (".png",))
    model = load(checkpoint, device)
    originals = read_images(images, model.config.model.image_size)
    copies = model.reconstruct(originals)
    for path, decibels in zip(images, psnr(originals, copies), strict=True):
        typer.echo(f"{path}: {decibels:.2f} dB")
    save_pairs(originals, copies, out)
    typer.echo(f"{len(images)} pairs in {out}")


def generate_with_progress(model, labels, seed: int, batch: int, settings: dict):
    """`TrainedUNITE.generate` with a progress bar."""
    import torch

    from unite_fast.config import check_seed_and_batch
    from unite_fast.utils.progress import track

    check_seed_and_batch(seed, batch)
    starts = range(0, len(labels), batch)
    parts = [
        model.generate(labels[start : start + batch], seed, batch, first=start, **settings)
        for start in track(starts, len(starts), "generating")
    ]
    return torch.cat(parts)
