"""Commands that generate and reconstruct images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unite_fast.commands import options

if TYPE_CHECKING:
    from torch import Tensor

    from unite_fast.sampling.pipeline import TrainedUNITE

app = typer.Typer()

IMAGE_COPIES = 4
"""Copies of its images that `sample` holds in memory at once: parts, joined, the grid, its file."""


@app.command()
def sample(
    checkpoint: options.Checkpoint,
    classes: options.Classes = "",
    count: Annotated[int, typer.Option(min=1, help="number of images")] = 80,
    guidance: options.Guidance = None,
    interval: options.Interval = None,
    solver: options.Solver = None,
    steps: options.Steps = None,
    seed: options.Seed = 0,
    batch: options.Batch = 64,
    device: options.Device = "auto",
    out: Annotated[Path, typer.Option(help="a .png (one grid), an .npz (arr_0, uint8 NHWC) or a folder")] = Path(
        "samples.png"
    ),
) -> None:
    """Generate images with the EMA weights.

    Example: `unite-fast sample runs/digits --classes 7 --count 20 --guidance 2 --out sevens.png`
    """
    from unite_fast.config import check_count
    from unite_fast.errors import require
    from unite_fast.sampling.sampler import choose_labels
    from unite_fast.utils.device import host_memory
    from unite_fast.utils.files import check_npz
    from unite_fast.utils.images import SAMPLES, check_no_others, save_images

    options.check_out(out, (".png", ".npz", ""), checkpoint)
    if out.suffix == ".npz":
        check_npz(out, SAMPLES)
    cycle = options.parse_classes(classes)
    changes = options.sampling_changes(guidance, interval, solver, steps)
    model = options.load(checkpoint, device)
    check_count("--count", count)
    needed = IMAGE_COPIES * count * 3 * model.config.model.image_size**2
    require(
        needed <= host_memory(),
        f"--count {count} images take {needed / 1e9:,.0f} GB, and this machine has {host_memory() / 1e9:,.0f} GB of "
        "memory: use unite-fast generate, which writes them one batch after another",
    )
    labels = choose_labels(cycle, count, model.config.model.num_classes)  # takes memory as well
    check_no_others(out, labels)
    images = generate_with_progress(model, labels, seed, batch, changes)
    save_images(images, labels, out, columns=10)
    typer.echo(f"{len(images)} images in {out}")


@app.command()
def generate(
    checkpoint: options.Checkpoint,
    out: Annotated[Path, typer.Option(help="an .npz (arr_0 uint8 NHWC, arr_1 classes) or a folder of PNGs")],
    # Two names: torchrun takes --num for an abbreviation of one of its own options.
    num: Annotated[int, typer.Option("--num", "--count", help="number of images")] = 50_000,
    classes: options.Classes = "",
    guidance: options.Guidance = None,
    interval: options.Interval = None,
    solver: options.Solver = None,
    steps: options.Steps = None,
    seed: options.Seed = 0,
    batch: options.Batch = 64,
    precision: options.Precision = None,
    compile: options.Compile = None,
    device: options.Device = "auto",
) -> None:
    """Generate many images with the EMA weights for evaluation, on one process or several under torchrun.

    Image i depends only on the seed, i and its class. If a run is interrupted, the same command resumes it.

    Examples:

    `unite-fast generate runs/imagenet256_b --num 50000 --out samples.npz`

    `torchrun --nproc-per-node 8 -m unite_fast generate runs/imagenet256_b --count 50000 --out samples.npz`
    """
    from unite_fast.checkpoint.folders import checkpoint_files
    from unite_fast.distributed.launch import ranks_of_torchrun
    from unite_fast.sampling.distributed_sampler import Generation
    from unite_fast.sampling.sample_writer import write_samples
    from unite_fast.sampling.sampler import choose_labels
    from unite_fast.utils.device import choose_device
    from unite_fast.utils.files import check_not_read

    changes = options.sampling_changes(guidance, interval, solver, steps)
    cycle = options.parse_classes(classes)
    with ranks_of_torchrun(choose_device(device)) as ranks:
        model = options.load(checkpoint, device)
        generation = Generation(
            choose_labels(cycle, num, model.config.model.num_classes),
            model.config.sampling.changed(**changes),
            seed,
            batch,
            *model.precision_and_compile(precision, compile),
        )
        check_not_read(out, checkpoint_files(checkpoint))
        manifest = write_samples(model, generation, out, ranks)
    if ranks.main:
        typer.echo(f"{num} images in {out}, their settings in {manifest}")


@app.command()
def reconstruct(
    checkpoint: options.Checkpoint,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="image files")],
    device: options.Device = "auto",
    out: Annotated[Path, typer.Option(help="a .png: originals above reconstructions")] = Path("reconstructions.png"),
) -> None:
    """Encode and decode images, and print the PSNR of each.

    Example: `unite-fast reconstruct runs/imagenet cat.jpg dog.png --out pets.png`
    """
    from unite_fast.data_pipeline.image_folder import read_images
    from unite_fast.evaluation.metrics import psnr
    from unite_fast.utils.images import save_pairs

    options.check_out(out, (".png",), checkpoint, *images)
    model = options.load(checkpoint, device)
    originals = read_images(images, model.config.model.image_size)
    reconstructions = model.reconstruct(originals)
    for path, decibels in zip(images, psnr(originals, reconstructions), strict=True):
        typer.echo(f"{path}: {decibels:.2f} dB")
    save_pairs(originals, reconstructions, out)
    typer.echo(f"{len(images)} pairs in {out}")


def generate_with_progress(model: "TrainedUNITE", labels: "Tensor", seed: int, batch: int, settings: dict) -> "Tensor":
    """`TrainedUNITE.generate` with a progress bar; `settings` are its sampling settings."""
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
